"""Many chats at a time with a server that speaks OpenAI's API, greedily; what fails for a moment is tried again.

A request that the server refuses is a reply with an error. A server that is gone, refuses all, or is none ends the
run: what has been answered by then is kept by the caller.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import openai
from openai.types.chat import ChatCompletion

from vllm_gemma4q.errors import InputError
from vllm_gemma4q.evaluation.gsm8k.answers import Reply
from vllm_gemma4q.evaluation.gsm8k.prompt import STOP, Messages

TEMPERATURE = 0.0
# More say that the server is broken (or its context too short for the prompt), not one question.
ERRORS_IN_A_ROW = 10


@dataclass(frozen=True)
class Patience:
    """With one request.

    Attributes:
        retries: when there is no server, or an overloaded one; after 0.5 s at first, later after at most 8 s.
        timeout: seconds from a request to its reply, of which it may have waited in the server's queue for most.
    """

    retries: int = 5
    timeout: float = 1800.0


PATIENT = Patience()


@dataclass(frozen=True)
class Endpoint:
    """Attributes:
    url: ends in `/v1`.
    model: the name that requests give.
    own: a server of this process's own, on this machine, which no proxy of the environment leads to.
    """

    url: str
    model: str
    patience: Patience = PATIENT
    own: bool = False

    def connect(self) -> openai.AsyncOpenAI:
        """The key is that of the environment, as for OpenAI's own clients; local servers need none."""
        return openai.AsyncOpenAI(
            base_url=self.url,
            api_key=os.environ.get("OPENAI_API_KEY", "none"),
            max_retries=self.patience.retries,
            timeout=openai.Timeout(self.patience.timeout, connect=5.0),
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if self.own else None,
        )


def ask_all(
    endpoint: Endpoint,
    chats: Mapping[int, Messages],
    max_tokens: int,
    concurrency: int,
    done: Callable[[int, Reply], None],
) -> None:
    """Ask all chats; `done` is told each reply as it arrives, in any order.

    Raises:
        InputError: the server cannot be reached, does not know the model or the key, or fails request after request.
    """
    try:
        asyncio.run(_ask_all(endpoint, chats, max_tokens, concurrency, done))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None


def served_models(url: str, patience: Patience) -> dict[str, str | None]:
    """Names of the models a server offers, and the path or repository each is loaded from where it says so.

    Raises:
        InputError: `url` is none, or nothing there answers as OpenAI's API does.
    """

    async def list_models() -> dict[str, str | None]:
        try:
            connected = Endpoint(url, "", patience).connect()
        except Exception as error:  # of whichever httpx there is, which has an error of its own for URLs
            raise InputError(f"--url: got {url}, expected http://HOST:PORT/v1: {error}") from error
        async with connected as client:
            found = await client.models.list()
            return {model.id: getattr(model, "root", None) for model in found.data}

    try:
        return asyncio.run(list_models())
    except openai.APIConnectionError as error:
        raise InputError(f"{url}: {_reason(error)}, expected a running server") from error
    except openai.APIStatusError as error:
        raise InputError(f"{url}/models: {_said(error)}, expected a list of models; the URL ends in /v1") from error
    except (openai.OpenAIError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{url}/models: no list of models, expected OpenAI's API; the URL ends in /v1") from error


async def _ask_all(
    endpoint: Endpoint,
    chats: Mapping[int, Messages],
    max_tokens: int,
    concurrency: int,
    done: Callable[[int, Reply], None],
) -> None:
    waiting, failures = iter(chats.items()), 0

    async def work(client: openai.AsyncOpenAI) -> None:
        nonlocal failures
        for index, messages in waiting:
            reply = await _ask(client, endpoint, messages, max_tokens)
            done(index, reply)
            failures = failures + 1 if reply.error is not None else 0
            if failures == ERRORS_IN_A_ROW:
                raise InputError(f"{endpoint.url}: {failures} requests in a row failed, the last with {reply.error}")

    async with endpoint.connect() as client, asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(chats))):
            group.create_task(work(client))


async def _ask(client: openai.AsyncOpenAI, endpoint: Endpoint, messages: Messages, max_tokens: int) -> Reply:
    try:
        completion = await client.chat.completions.create(
            model=endpoint.model,
            messages=messages,  # type: ignore[arg-type]  # plain dicts, as in the API
            max_tokens=max_tokens,
            temperature=TEMPERATURE,
            stop=list(STOP),
        )
    except openai.APIConnectionError as error:
        raise InputError(f"{endpoint.url}: {_reason(error)}; run the same command again to go on") from error
    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
        raise InputError(f"{endpoint.url}: model {endpoint.model}: {_said(error)}") from error
    except openai.APIStatusError as error:
        return Reply(error=_said(error))
    except (openai.APIError, ValueError) as error:
        return Reply(error=f"no chat completion: {_line(str(error))}")
    return _read(completion)


def _read(completion: ChatCompletion) -> Reply:
    if not isinstance(completion, ChatCompletion) or not completion.choices:
        return Reply(error=f"no chat completion: {_line(str(completion))}")
    choice, usage = completion.choices[0], completion.usage
    return Reply(choice.message.content or "", choice.finish_reason, usage.completion_tokens if usage else None)


def _reason(error: openai.APIConnectionError) -> str:
    if isinstance(error, openai.APITimeoutError):
        return "no reply in time"
    return f"no connection ({_line(str(error.__cause__ or error))})"


def _said(error: openai.APIStatusError) -> str:
    return f"HTTP {error.status_code}: {_line(error.message)}"


def _line(text: str, length: int = 300) -> str:
    return " ".join(text.split())[:length]
