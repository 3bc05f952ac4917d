"""One layer is in memory at a time: each is gone, without the garbage collector, when the next is asked for."""

import gc
import weakref
from dataclasses import replace

from calibration_runs import SPILLED, calibration

from vllm_gemma4q.calibration.calibrate import calibrate
from vllm_gemma4q.calibration.decoder import Decoder


def test_layers_go_before_the_next_is_loaded(kind, text, tmp_path, monkeypatch):
    loaded, load = [], Decoder.layer

    def watched(self, index):
        assert not [number for number, layer in loaded if layer() is not None]
        layer = load(self, index)
        loaded.append((index, weakref.ref(layer)))
        return layer

    monkeypatch.setattr(Decoder, "layer", watched)
    run = replace(calibration(kind, text, limit=SPILLED), passes=2)
    gc.collect()
    gc.disable()
    try:
        calibrate(run, tmp_path / "statistics", tmp_path / "work", tmp_path / "fisher")
    finally:
        gc.enable()
    n_layers = run.decoder.n_layers
    assert [number for number, _ in loaded] == [*range(n_layers), *reversed(range(n_layers))]
