"""What goes with a step for the last stage alone: ids to score, and how tokens are to be drawn.

Two tensors behind the rows, each only where some segment wants it. Stages before the last hold
their sizes against what the header says, and pass them on as they are.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError, MessageError
from pipeline.protocol.result_kinds import Result, Want
from pipeline.sampling.draw import Draw
from pipeline.sampling.params import MAX_BIASES, SamplingParams
from transport.tensor_frames import DType, Tensor, TensorSpec

# The largest vocabularies have a quarter of this.
MAX_VOCAB = 1 << 20

# temperature f64 | top-p f64 | min-p f64 | repetition, presence, frequency penalty f64
# | top-k u32 | tokens of the text u32, of its prompt u32 | biased tokens u32 | mask bytes u32
_DRAW = Struct("<6d5I")
# a uniform number f64 and all of a mask for each row, a drafted token u32 for all but one
_ROW_BYTES = 8 + 4 + MAX_VOCAB // 8
# id u32 of a token of the text, id u32 and bias f64 of another
_ID_BYTES, _BIAS_BYTES = 4, 12


class Asked(NamedTuple):
    """For segments that want LOGPROBS the ids to score, row by row; a `Draw` for those DRAWN."""

    token_ids: tuple[int, ...] = ()
    draws: tuple[Draw, ...] = ()


NOTHING_ASKED = Asked()


def asked_specs(
    wants: Sequence[Want], declared: Sequence[TensorSpec], max_seq_len: int
) -> tuple[TensorSpec, ...]:
    """The tensors behind the rows, of those that are `declared`; the bytes of draws are bounded."""
    num_given = num_drawn = num_rows = 0
    for want in wants:
        if want.result is Result.DRAWN:
            num_drawn += 1
            num_rows += want.rows
        else:
            num_given += want.num_given
    specs: tuple[TensorSpec, ...] = ()
    if num_given:
        specs = (TensorSpec(DType.U32, (num_given,)),)
    if num_drawn:
        least = num_drawn * _DRAW.size + num_rows * (8 + 4) - 4 * num_drawn
        most = max_draw_bytes(num_drawn, num_rows, max_seq_len)
        num_bytes = min(max(declared[-1].nbytes if declared else 0, least), most)
        specs = (*specs, TensorSpec(DType.U8, (num_bytes,)))
    return specs


def max_draw_bytes(num_slots: int, num_rows: int, max_seq_len: int) -> int:
    """Most bytes of draws of so many slots and rows in one step."""
    per_slot = _DRAW.size + _ID_BYTES * max_seq_len + _BIAS_BYTES * MAX_BIASES
    return num_slots * per_slot + num_rows * _ROW_BYTES


def asked_to_wire(asked: Asked) -> tuple[Tensor, ...]:
    """The tensors that tell the last stage."""
    tensors = []
    if asked.token_ids:
        ids = np.array(asked.token_ids, "<u4")
        tensors.append(Tensor(TensorSpec(DType.U32, ids.shape), ids.data.cast("B")))
    if asked.draws:
        data = b"".join([part for how in asked.draws for part in _draw_parts(how)])
        tensors.append(Tensor(TensorSpec(DType.U8, (len(data),)), memoryview(data)))
    return tuple(tensors)


def end_of_text(how: Draw) -> int:
    """Where, in the bytes of a draw, the last token of its text is."""
    num_rows = len(how.uniforms)
    return _DRAW.size + 8 * num_rows + 4 * (num_rows - 1) + _ID_BYTES * (how.text.size - 1)


def _draw_parts(how: Draw) -> Iterator[bytes]:
    params = how.params
    # On a token that no model has, a bias has no effect.
    bias = {at: value for at, value in params.logit_bias.items() if at < MAX_VOCAB}
    yield _DRAW.pack(
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        max(params.top_k, 0),  # -1 is 0 in other words
        how.text.size,
        how.num_prompt,
        len(bias),
        len(how.allowed),
    )
    yield np.array(how.uniforms, "<f8").tobytes()
    yield np.array(how.drafted, "<u4").tobytes()
    yield how.text.astype("<u4").tobytes()
    yield np.array(list(bias), "<u4").tobytes()
    yield np.array(list(bias.values()), "<f8").tobytes()
    yield how.allowed


def asked_from_wire(wants: Sequence[Want], tensors: Sequence[Tensor], vocab_size: int) -> Asked:
    """Read tensors whose specs have been checked.

    Raises MessageError where they hold an id outside the vocabulary or no valid draw.
    """
    rest = list(tensors)
    token_ids: tuple[int, ...] = ()
    if any(want.num_given for want in wants):
        token_ids = tuple(np.frombuffer(rest.pop(0).data, "<u4").tolist())
        if max(token_ids) >= vocab_size:
            raise MessageError(f"an id to score is outside the vocabulary of {vocab_size}")
    drawn = [want for want in wants if want.result is Result.DRAWN]
    if not drawn:
        return Asked(token_ids)
    reader = _Reader(rest[0].data)
    draws = tuple(_read_draw(reader, want.rows, vocab_size) for want in drawn)
    if reader.num_left:
        raise MessageError(f"{reader.num_left} bytes lie behind the last draw of a step")
    return Asked(token_ids, draws)


class _Reader:
    """Takes arrays from bytes, never beyond their end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    @property
    def num_left(self) -> int:
        return len(self._data)

    def take(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._data):
            raise MessageError(f"a draw ends {num_bytes - len(self._data)} bytes too early")
        taken, self._data = self._data[:num_bytes], self._data[num_bytes:]
        return taken

    def ids(self, num: int, vocab_size: int) -> npt.NDArray[np.uint32]:
        found = np.frombuffer(self.take(4 * num), "<u4")
        if found.size and int(found.max()) >= vocab_size:
            raise MessageError(f"a draw names a token outside the vocabulary of {vocab_size}")
        return found


def _read_draw(reader: _Reader, num_rows: int, vocab_size: int) -> Draw:
    (
        temperature, top_p, min_p, repetition, presence, frequency,
        top_k, num_text, num_prompt, num_biases, mask_bytes,
    ) = _DRAW.unpack(reader.take(_DRAW.size))  # fmt: skip
    if num_biases > MAX_BIASES or mask_bytes not in {0, num_rows * (-(-vocab_size // 8))}:
        raise MessageError(
            f"a draw has {num_biases} biases and a mask of {mask_bytes} bytes for "
            f"{num_rows} rows and a vocabulary of {vocab_size}"
        )
    if num_prompt > num_text:
        raise MessageError(f"a draw has a text of {num_text} tokens, {num_prompt} of a prompt")
    uniforms = tuple(np.frombuffer(reader.take(8 * num_rows), "<f8").tolist())
    drafted = tuple(reader.ids(num_rows - 1, vocab_size).tolist())
    text = reader.ids(num_text, vocab_size)
    biased = reader.ids(num_biases, MAX_VOCAB).tolist()
    biases = np.frombuffer(reader.take(8 * num_biases), "<f8").tolist()
    if not all(0 <= uniform < 1 for uniform in uniforms):
        raise MessageError("a draw has a number outside of [0, 1) to draw with")
    try:
        params = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=dict(zip(biased, biases, strict=True)),
        )
    except InputError as error:
        raise MessageError(f"a draw is not valid: {error}") from error
    allowed = bytes(reader.take(mask_bytes))
    return Draw(params, uniforms, text, num_prompt, drafted, allowed)
