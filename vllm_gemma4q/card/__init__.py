"""Model cards: what a manifest says was done, and what result files say was measured. Nothing else is claimed."""
