"""What `--json` prints of a run: everything that is known of it but the texts."""

from typing import Any

from vllm_gemma4q.evaluation.gsm8k.answers import Parse
from vllm_gemma4q.evaluation.gsm8k.results import Results
from vllm_gemma4q.evaluation.gsm8k.score import score


def report(results: Results) -> dict[str, Any]:
    """The same for a resumed run as for one that was not stopped: nothing of it is a time."""
    tokens = [reply.tokens for reply in results.replies.values() if reply.tokens is not None]
    cut = sum(reply.finish_reason == "length" for reply in results.replies.values())
    return {
        "run": dict(results.identity),
        "results": str(results.path),
        **{str(parse): score(results.outcomes(parse).values()).to_json() for parse in Parse},
        "cut_by_max_tokens": cut,
        "tokens": sum(tokens),
        "comparison": None,
    }
