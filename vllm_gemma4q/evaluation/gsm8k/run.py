"""One run: what is asked, of whom, into which file; goes on where an earlier one stopped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.answers import Reply, normalise
from vllm_gemma4q.evaluation.gsm8k.client import PATIENT, TEMPERATURE, Endpoint, Patience, ask_all, served_models
from vllm_gemma4q.evaluation.gsm8k.prompt import STOP, build_messages, prompt_digest
from vllm_gemma4q.evaluation.gsm8k.questions import Question, digest
from vllm_gemma4q.evaluation.gsm8k.results import Results, writing
from vllm_gemma4q.evaluation.server import MODEL_NAME, serve


@dataclass(frozen=True)
class Protocol:
    """What is asked.

    Attributes:
        questions: in the order of their numbers.
        shots: shown before each question.
        max_tokens: of a reply.
    """

    questions: Sequence[Question]
    shots: Sequence[Question]
    max_tokens: int

    def to_json(self) -> dict[str, Any]:
        """What a result file keeps of it, to refuse lines of another run."""
        return {
            "questions": {"sha256": digest(self.questions), "count": len(self.questions)},
            "prompt": {"sha256": prompt_digest(self.shots), "shots": len(self.shots)},
            "max_tokens": self.max_tokens,
            "temperature": TEMPERATURE,
            "stop": list(STOP),
        }


@dataclass(frozen=True)
class Target:
    """Who is asked.

    Attributes:
        identity: the model's name and what tells it from others of that name; the server's flags.
        url: of a running server, or None to serve `checkpoint` for the time of the run.
        model: the name that requests give.
        checkpoint: folder, where there is no `url`.
        flags: of `vllm serve`.
        patience: with its requests.
    """

    identity: Mapping[str, Any]
    url: str | None
    model: str
    checkpoint: Path | None = None
    flags: Sequence[str] = ()
    patience: Patience = PATIENT

    @contextmanager
    def reached(self, log: Path) -> Iterator[Endpoint]:
        """The server, for the time of the block.

        Raises:
            InputError: see `serve`; what the block raises then names the log too.
        """
        if self.url is not None:
            yield Endpoint(self.url, self.model, self.patience)
            return
        assert self.checkpoint is not None
        with serve(self.checkpoint, self.flags, log) as server:
            try:
                yield Endpoint(server.url, self.model, self.patience, own=True)
            except InputError as error:
                raise InputError(f"{error} (see {log})") from error


def running_server(url: str, model: str | None, patience: Patience) -> Target:
    """A server's model, its only one where none is named.

    Raises:
        InputError: `url` is none, nothing there speaks OpenAI's API, or it does not offer the model; lists those it
            does.
    """
    if not _is_url(url):
        raise InputError(f"--url: got {url}, expected http://HOST:PORT/v1")
    url = url.rstrip("/")
    offered = served_models(url, patience)
    if model is None and len(offered) == 1:
        model = next(iter(offered))
    if model is None or model not in offered:
        raise InputError(f"--model: got {model}, expected one of {', '.join(offered) or 'none, the server has none'}")
    return Target({"model": {"name": model, "root": offered[model]}}, url, model, patience=patience)


def _is_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        return False


def checkpoint_folder(folder: Path, flags: Sequence[str], patience: Patience) -> Target:
    """A checkpoint that is served for the time of the run. Raises InputError: it is none."""
    from vllm_gemma4q.calibration.identity import model_identity  # takes seconds to import
    from vllm_gemma4q.checkpoint import open_checkpoint

    identity = {"model": model_identity(open_checkpoint(folder)), "serve_flags": list(flags)}
    return Target(identity, None, MODEL_NAME, folder, flags, patience)


def run(
    protocol: Protocol,
    target: Target,
    path: Path,
    concurrency: int,
    log: Path,
    progress: Callable[[int], None],
) -> Results:
    """Ask what is not answered yet, each reply appended to `path` as it arrives.

    Args:
        progress: called with the questions answered so far, first with those of an earlier run.
        log: receives what a server started for the run prints.

    Raises:
        InputError: see `writing`, `ask_all` and `serve`.
    """
    identity = {**target.identity, **protocol.to_json()}
    with writing(path, identity) as writer:
        results = writer.results
        chats = {
            index: build_messages(protocol.shots, question.question)
            for index, question in enumerate(protocol.questions)
            if index not in results.answered
        }
        progress(len(results.answered))

        def done(index: int, reply: Reply) -> None:
            writer.append(index, normalise(protocol.questions[index].answer), reply)
            progress(len(results.answered))

        if chats:
            with target.reached(log) as endpoint:
                ask_all(endpoint, chats, protocol.max_tokens, concurrency, done)
    return results
