"""Peak memory of both passes: a few blocks of rows, whatever the tensors' sizes."""

import sys
from pathlib import Path

from made_statistics import write_for
from peak_memory import measure
from synthetic import CONFIG_31B, shapes, write_header_only

GEMMA4Q = Path(sys.executable).with_name("gemma4q")
MB = 1_000_000


def test_peak_memory_is_bounded_whatever_the_largest_tensor(tmp_path):
    """One layer of the 31B: three tensors of 231 MB, a checkpoint of about 1 GB (of zeros, so it is written fast)."""
    text = {
        **CONFIG_31B["text_config"],
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "vocab_size": 1024,
    }
    config = {**CONFIG_31B, "text_config": text, "vision_config": None}
    source = write_header_only(tmp_path / "source", config, shapes(config).items())
    write_for(source, tmp_path / "statistics")
    options = ["--scheme", "fp8-static", "--statistics", tmp_path / "statistics"]
    peak = measure([GEMMA4Q, "quantize", source, tmp_path / "target", *options]).peak_bytes
    assert peak < 500 * MB, "both passes should hold blocks, not tensors"
