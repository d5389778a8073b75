"""Texts that pass a layer together: of similar length, padded on the right, within some tokens.

Attention looks back only, so what follows a text's last token changes nothing before it. Whether
a layer keeps to that is looked at, not believed: `agree` compares two texts alone and together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rain_mergekit.capture.layer_calls import LayerCall, run_layer
from rain_mergekit.models.attention import BlockMask

# How far hidden states may differ between alone and together, relative: rounding stays far below,
# attention that looks ahead far above.
_NEAR, _NEAR_16_BIT = 1e-3, 0.1
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class TextBatch:
    """Texts that pass a layer in one call, the longest first; each with its number of tokens."""

    texts: tuple[int, ...]
    lengths: tuple[int, ...]

    def join(self, hidden: Sequence[Tensor]) -> Tensor:
        """The texts' hidden states (T_i, d), one below the other, zeros after the shorter ones."""
        if len(hidden) == 1:
            return hidden[0][None]
        return nn.utils.rnn.pad_sequence(list(hidden), batch_first=True)

    def part(self, rows: Tensor, number: int) -> Tensor:
        """From a row for each place of the batch, those (T_i, width) of its text `number`."""
        return rows.reshape(len(self.texts), self.lengths[0], -1)[number, : self.lengths[number]]

    def only(self, wanted: Callable[[int], bool]) -> TextBatch | None:
        """The same without the texts that are not wanted; None where none is."""
        kept = [one for one in zip(self.texts, self.lengths, strict=True) if wanted(one[0])]
        return TextBatch(*zip(*kept, strict=True)) if kept else None

    @property
    def alone(self) -> list[TextBatch]:
        """Each text as a batch of its own."""
        pairs = zip(self.texts, self.lengths, strict=True)
        return [TextBatch((text,), (length,)) for text, length in pairs]


def batches(
    calls: Sequence[Sequence[LayerCall]], lengths: Sequence[int], tokens: int
) -> list[TextBatch]:
    """Batches of at most `tokens` places, padding counted, unless a single text has more.

    calls: of each text, a call for each layer. Texts stay apart where the arguments of a shorter
    one's calls are not the beginning of the longer one's.
    """
    alike = _Alike()
    found: list[list[int]] = []
    for text in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        first = found[-1][0] if found else text
        room = bool(found) and (len(found[-1]) + 1) * lengths[first] <= tokens
        if room and alike.calls(calls[text], calls[first]):
            found[-1].append(text)
        else:
            found.append([text])
    return [TextBatch(tuple(one), tuple(lengths[text] for text in one)) for one in found]


def agree(
    layer: nn.Module,
    batch: TextBatch,
    hidden: Callable[[int], Tensor],
    call: Callable[[int], LayerCall],
) -> bool:
    """Whether the layer gives two texts of the batch together what it gives each alone.

    hidden, call: of a text. False too for a layer that takes one text at a time alone.
    """
    ends = (batch.texts[0], batch.texts[-1])
    pair = TextBatch(ends, (batch.lengths[0], batch.lengths[-1]))
    states = [hidden(text) for text in ends]
    try:
        together = run_layer(layer, pair.join(states), call(ends[0]))
        found = [pair.part(together, number) for number in range(2)]
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    near = _NEAR_16_BIT if states[0].dtype.itemsize < 4 else _NEAR
    alone = [run_layer(layer, one, call(text)) for one, text in zip(states, ends, strict=True)]
    return all(
        float((own - other).norm()) <= near * float(own.norm())
        for own, other in zip(alone, found, strict=True)
    )


class _Alike:
    """Whether the arguments of one call are the beginning of another's; each pair is asked once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}

    def calls(self, short: Sequence[LayerCall], long: Sequence[LayerCall]) -> bool:
        """Of all layers."""
        return all(map(self._call, short, long))

    def _call(self, short: LayerCall, long: LayerCall) -> bool:
        key = id(short), id(long)
        if key not in self._known:
            same = (short.args, dict(short.kwargs)), (long.args, dict(long.kwargs))
            self._known[key] = _begins(*same)
        return self._known[key]


def _begins(short: Any, long: Any) -> bool:
    """Whether `short` is `long` as far as it goes."""
    if short is long or type(short) is not type(long):
        return short is long
    if isinstance(short, Tensor):
        return _tensor_begins(short, long)
    if isinstance(short, BlockMask):
        rows = torch.arange(short.length)
        return torch.equal(short.rows(rows), long.rows(rows)[:, : short.length])
    if isinstance(short, Mapping):
        return short.keys() == long.keys() and all(_begins(v, long[k]) for k, v in short.items())
    if isinstance(short, (tuple, list)):
        return len(short) == len(long) and all(map(_begins, short, long))
    return isinstance(short, _PLAIN) and bool(short == long)


def _tensor_begins(short: Tensor, long: Tensor) -> bool:
    if short.dtype != long.dtype or short.dim() != long.dim():
        return False
    part = long[tuple(slice(size) for size in short.shape)]
    if part.shape != short.shape:
        return False
    shared = part.data_ptr() == short.data_ptr() and part.stride() == short.stride()
    return shared or torch.equal(part, short)
