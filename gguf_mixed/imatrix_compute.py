"""An importance matrix of a model and a text, by the real llama-imatrix, checked against the model.

Not done: continuing an earlier one (`llama-imatrix --in-file`), the legacy format.
"""

from pathlib import Path

from gguf_mixed.atomic_file import check_not_read, replacing
from gguf_mixed.errors import InputError
from gguf_mixed.imatrix import Imatrix
from gguf_mixed.imatrix_gguf import read_imatrix
from gguf_mixed.llama_cpp import Log, asking_for, check_chunks, error_line, inference_options, run_tool
from gguf_mixed.tensors import read_inventory

DEFAULT_CONTEXT = 512
MOST_CHUNKS = 64


def compute_imatrix(
    tool: Path,
    model: Path,
    text: Path,
    output: Path,
    *,
    chunks: int | None = None,
    context: int = DEFAULT_CONTEXT,
    threads: int | None = None,
    process_output: bool = False,
    parse_special: bool = False,
    log: Log = lambda line: None,
) -> Imatrix:
    """Run a model over the start of a text; `output` appears only when it is complete.

    Args:
        tool: llama-imatrix.
        model: GGUF; of a split one, the first file.
        text: UTF-8.
        chunks: how many of `context` tokens, which the text must hold; None for all that it holds, at most
            `MOST_CHUNKS`. Two are the least.
        process_output: also for the output tensor, which is the embeddings where these are tied.
        parse_special: read `<|turn>` and the like as control tokens: for text in the chat format.
        log: gets every line printed.

    Raises:
        InputError: too little text, llama-imatrix fails or knows no such option, its file does not fit the model, or
            `output` is one of the files that are read.
    """
    most = MOST_CHUNKS if chunks is None else chunks
    if most < 1 or context < 1:
        raise InputError(f"{most} chunks of {context} tokens: at least one of each is needed")
    inventory = read_inventory(model)
    check_not_read(output, [*(header.path for header in inventory.headers), text])
    command = [str(tool), "-m", str(model), "-f", str(text), "--chunks", str(most), "--no-ppl"]
    command += ["--ctx-size", str(context), "--batch-size", str(context)]
    command += ["--process-output"] if process_output else []
    command += ["--parse-special"] if parse_special else []
    command += inference_options(tool, threads)
    with replacing(output, ".partial.gguf") as partial:  # some builds choose the format by this ending
        told = log if chunks is None else asking_for(chunks, context, text, log)
        lines = run_tool([*command, "-o", str(partial)], told)
        if not partial.exists() or not partial.stat().st_size:
            raise InputError(f"llama-imatrix: wrote nothing: {error_line(lines) or 'no error printed'}")
        imatrix = read_imatrix(partial)
        imatrix.matches(inventory)
        if chunks is not None:
            check_chunks(imatrix.chunk_count, chunks, context, text)
    return imatrix
