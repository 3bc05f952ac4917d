"""What can score text: one file an engine, each with `facts` and `score` as `interface.Engine` has them."""
