"""Whether a Hugging Face folder can be the model of a run, found out from its config and the headers of its files."""

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.safetensors_folder import SafetensorsFolder
from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.gpt import check_sizes


def check_model(folder: str, side: Side, run: RunConfig) -> Architecture:
    """Look at a model before anything is built of it; process groups need not be there.

    Args:
        folder: The model.
        side: How it reads.
        run: The layout, precision and lengths that it is to work with.

    Raises:
        InputError: Its config, the names, shapes or dtypes of its tensors, its vocabulary or its positions do not fit.
    """
    architecture = read_architecture(folder)
    SafetensorsFolder(folder, architecture)
    check_vocabulary(side, architecture.vocab_size, folder)
    longest = architecture.max_position_embeddings
    if run.data.max_length > longest:
        raise InputError("data.max_length", str(run.data.max_length), f"at most the {longest} positions of {folder}")
    check_sizes(architecture, run.parallel, run.precision)
    return architecture


def check_vocabulary(side: Side, vocab_size: int, folder: str) -> None:
    """Stop where a tokenizer can give an id that the weights have no row for.

    A special token beyond the weights that no template writes, such as a ``[PAD]`` that was added behind all others, is
    given by nothing: its string in a message is text.

    Raises:
        InputError: It can.
    """
    beyond = {index for index in side.tokenizer.get_vocab().values() if index >= vocab_size}
    if any(_can_be_given(side, index) for index in beyond):
        raise InputError(
            folder,
            f"a tokenizer with ids up to {max(beyond)} and weights of {vocab_size} rows",
            "an embedding with a row for every id",
        )


def _can_be_given(side: Side, index: int) -> bool:
    token = side.tokenizer.added_tokens_decoder.get(index)
    if token is None or not token.special or index in side.end_of_turn_ids:
        return True
    names = [name for name, role in side.tokenizer.special_tokens_map.items() if str(role) == token.content]
    if any(word in side.chat_template for word in (token.content, *names)):
        return True
    # A template may put it together, or a message's text be taken for it.
    prompts = side.render_prompts([[Message("user", "x")], [Message("user", f"a {token.content} b")]])
    return any(index in ids for ids in prompts)
