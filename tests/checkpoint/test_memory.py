"""Peak memory of the quantizer: a few blocks of rows, whatever the tensors' sizes."""

import sys
from pathlib import Path

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
    largest = 2 * 21504 * 5376
    command = [GEMMA4Q, "quantize", source, tmp_path / "target", "--scheme", "quark-int8"]
    peak = measure(command).peak_bytes
    assert peak < 2.5 * largest + 400 * MB
    assert peak < 500 * MB, "the stream should hold blocks, not tensors"


def test_the_measurement_sees_what_a_process_holds_and_no_more():
    """With a large caller, too."""
    ballast = bytearray(b"x") * (700 * MB)
    small = measure([sys.executable, "-c", "pass"]).peak_bytes
    large = measure([sys.executable, "-c", f"bytearray(b'x') * {300 * MB}"]).peak_bytes
    assert small < 100 * MB < 300 * MB < large < len(ballast)
