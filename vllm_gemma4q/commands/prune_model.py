"""What `gemma4q prune` does by running the model: judge candidates, spread a budget over layers, refit."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from gguf_mixed.drop_map import RetainedExperts
from gguf_mixed.temporary import temporary_folder
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.commands.model import Device, Dtype, load_decoder
from vllm_gemma4q.errors import InputError
from vllm_gemma4q.pruned_moe.choose import Chooser
from vllm_gemma4q.pruned_moe.knobs import Options
from vllm_gemma4q.pruned_moe.select import best

if TYPE_CHECKING:  # transformers, which only these need
    from vllm_gemma4q.calibration.decoder import Decoder
    from vllm_gemma4q.calibration.texts import Samples
    from vllm_gemma4q.calibration.work import Work
    from vllm_gemma4q.pruned_moe.judge import Verdict

_PROBE_SAMPLES = 16
REFIT = " + refit"


@dataclass(frozen=True)
class Text:
    """How texts are cut, and where the model runs.

    Attributes:
        limit: bytes of activations to keep in memory.
    """

    samples: int
    max_length: int
    raw: bool
    device: Device
    dtype: Dtype
    limit: int


class PrunedModel:
    """A model whose layers are loaded one at a time.

    Args:
        text: files for the refit and for measuring layers.
        options: what else the prune changes. Layers are measured without.
    """

    def __init__(self, source: Checkpoint, run: Text, text: Sequence[Path], options: Options | None = None):
        self._source, self._run, self._text, self._options = source, run, text, options or Options()

    def judge(
        self,
        held_out: Sequence[Path],
        candidates: Mapping[str, RetainedExperts],
        refit_first: bool,
        work: Path | None,
    ) -> "dict[str, Verdict]":
        """Compare candidates on held-out text; the first one also as it is after a refit.

        Args:
            work: folder for what the refit writes meanwhile; None for the system's.
        """
        from vllm_gemma4q.pruned_moe.judge import judge, n_steps
        from vllm_gemma4q.pruned_moe.streams import Variant

        if work is not None and not work.is_dir():
            raise InputError(f"--work: {work}: not a folder, expected one for temporary files")
        samples = self._cut(held_out, self._run.samples)
        variants = {name: Variant(retained, options=self._options) for name, retained in candidates.items()}
        first = next(iter(candidates))
        with temporary_folder(place=work) as folder:
            if refit_first:
                weights = self.refit(candidates[first], folder / "refit")
                variants[first + REFIT] = Variant(candidates[first], weights.tensors, self._options)
            return self._judged(judge, n_steps, samples.ids, variants)

    def spread(self, chooser: Chooser, recipe: str) -> RetainedExperts:
        """`keep` experts a layer on average, as many in each as costs least."""
        from vllm_gemma4q.pruned_moe.budget import probe_counts, probes, spread
        from vllm_gemma4q.pruned_moe.judge import judge, n_steps
        from vllm_gemma4q.pruned_moe.streams import Variant

        scores, (n_layers, num_experts) = chooser.scores(recipe), chooser.shape
        counts = probe_counts(num_experts, self._decoder.architecture.top_k_experts or 1, chooser.keep)
        variants = {name: Variant(retained) for name, retained in probes(scores, counts).items()}
        samples = self._cut(self._text, max(len(self._text), min(_PROBE_SAMPLES, self._run.samples)))
        verdicts = self._judged(judge, n_steps, samples.ids, variants, "layers' losses")
        losses = {name: verdict.mean for name, verdict in verdicts.items()}
        return best(scores, spread(losses, n_layers, counts, num_experts, chooser.keep * n_layers))

    def refit(self, retained: RetainedExperts, folder: Path) -> Checkpoint:
        """The refitted tensors, in a work folder that the caller removes; one of the same refit is taken up."""
        from vllm_gemma4q.pruned_moe.refit import Refit, refitted
        from vllm_gemma4q.pruned_moe.streams import Variant

        with self._work(retained, folder) as work:
            job = Refit(self._decoder, Variant(retained, options=self._options), self._samples.ids, work)
            with _token_bar(job.n_steps, "refit") as bar:
                job.run(bar.update)
            return refitted(work, self._decoder)

    def drop_refit(self, retained: RetainedExperts, folder: Path) -> None:
        """Remove the work folder of this refit. Raises InputError: it is of another, or another run is in it."""
        with self._work(retained, folder) as work:
            work.complete()

    def _work(self, retained: RetainedExperts, folder: Path) -> "Work":
        from vllm_gemma4q.calibration.identity import decoder_identity
        from vllm_gemma4q.calibration.work import Work

        chosen = {"retained": retained.to_json(), "options": asdict(self._options)}
        return Work(folder, {**decoder_identity(self._decoder), "texts": self.details(), **chosen})

    def details(self) -> dict[str, Any]:
        """What the refit runs on, for the manifest."""
        samples = self._samples
        return {
            "samples": len(samples.ids),
            "tokens": samples.n_tokens,
            "max_length": self._run.max_length,
            "framing": samples.framing,
            "texts": list(samples.described),
            "device": self._run.device.value,
            "dtype": str(self._decoder.dtype).removeprefix("torch."),
        }

    @cached_property
    def _decoder(self) -> "Decoder":
        if "quantization_config" in self._source.config:
            raise InputError(
                "config.json: got a quantized checkpoint, and --text and --evaluate run the model, which takes BF16, "
                "F16 or F32: prune the checkpoint it was made from, or leave them out"
            )
        return load_decoder(self._source, self._run.device, self._run.dtype)

    @cached_property
    def _samples(self) -> "Samples":
        """Of the refit: cut once, since that tokenizes all of the text."""
        return self._cut(self._text, self._run.samples)

    def _cut(self, paths: Sequence[Path], n_samples: int) -> "Samples":
        from vllm_gemma4q.calibration.texts import load_samples

        return load_samples(self._source.folder, list(paths), n_samples, self._run.max_length, self._run.raw)

    def _judged(
        self, judge: Any, n_steps: Any, ids: Any, variants: Mapping[str, Any], what: str = "judging"
    ) -> "dict[str, Verdict]":
        total = n_steps(variants, self._decoder.n_layers, sum(map(len, ids)))
        with _token_bar(total, what) as bar:
            found: dict[str, Verdict] = judge(self._decoder, ids, variants, self._run.limit, bar.update)
            return found


def _token_bar(total: int, description: str) -> "tqdm[NoReturn]":
    return tqdm(total=total, unit="token layer", unit_scale=True, desc=description, disable=not sys.stderr.isatty())
