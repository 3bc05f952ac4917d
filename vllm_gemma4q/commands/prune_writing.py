"""Writing a pruned checkpoint: as it is, or with `down_proj` refitted first."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gguf_mixed.drop_map import RetainedExperts
from vllm_gemma4q.checkpoint import Checkpoint
from vllm_gemma4q.checkpoint.convert import Conversion, convert, refuse_inside
from vllm_gemma4q.checkpoint.run import check_takes_run, check_whole, manifest_of
from vllm_gemma4q.commands.progress import byte_bar
from vllm_gemma4q.commands.prune_model import PrunedModel
from vllm_gemma4q.pruned_moe.knobs import Options
from vllm_gemma4q.pruned_moe.prune import plan

_REQUEST = "request"


def work_folder(target: Path) -> Path:
    """Of a refit, where none is named."""
    return target.with_name(target.name + ".work")


def check_places(source: Checkpoint, *places: Path) -> None:
    """Look at where a checkpoint and its refit will go.

    Raises:
        InputError: one lies within the source, or holds what no run of ours has left.
    """
    for place in places:
        refuse_inside(place, source.folder)
        check_takes_run(place)


@dataclass(frozen=True)
class Writing:
    """What to write."""

    source: Checkpoint
    retained: RetainedExperts
    options: Options
    max_shard_bytes: int

    def plain(self, target: Path, provenance: Mapping[str, Any], dry_run: bool) -> tuple[Conversion, bool]:
        """The conversion, and whether anything was written."""
        conversion = self._plan(None, provenance)
        return conversion, not dry_run and _write(conversion, target)

    def refitted(
        self, target: Path, folder: Path, model: PrunedModel, provenance: Mapping[str, Any], dry_run: bool
    ) -> tuple[Conversion, bool]:
        """The same after a refit in a work folder, which goes once the target is complete.

        The target is looked at first: a refit takes long, and for a finished one it is not made again.
        """
        unfitted = self._plan(None, provenance)
        if dry_run:
            return unfitted, False
        details = {**provenance, "refit": model.details()}
        request = self._request(details)
        if _is_done(target, request):
            if folder.exists():  # killed while it was removed
                model.drop_refit(self.retained, folder)
            return unfitted, False
        check_places(self.source, target, folder)
        conversion = self._plan(model.refit(self.retained, folder), {**details, _REQUEST: request})
        written = _write(conversion, target)
        model.drop_refit(self.retained, folder)
        return conversion, written

    def _plan(self, weights: Checkpoint | None, provenance: Mapping[str, Any]) -> Conversion:
        return plan(self.source, self.retained, self.options, self.max_shard_bytes, weights, provenance)

    def _request(self, details: Mapping[str, Any]) -> str:
        """What decides the result, work folder aside."""
        identity = self._plan(None, {}).identity()
        decided = json.dumps([identity, details, asdict(self.options), self.retained.kept], sort_keys=True)
        return hashlib.sha256(decided.encode()).hexdigest()


def _is_done(target: Path, request: str) -> bool:
    """Raises InputError: it was, and a file of it is gone or has another size."""
    manifest = manifest_of(target)
    if (manifest.get("details") or {}).get(_REQUEST) != request:
        return False
    check_whole(target, manifest)
    return True


def _write(conversion: Conversion, target: Path) -> bool:
    with byte_bar(conversion.source_bytes, conversion.scheme) as bar:
        return convert(conversion, target, ["gemma4q", *sys.argv[1:]], bar.update)
