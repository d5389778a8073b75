"""The progress bar of a calibration: layer, sample, tokens per second, time left."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar over all tokens of all layers; a context manager.

    layers: of the model; `first` of them are done already.
    samples, tokens: those that pass each layer, every pass counted. label: stands before the
    layer's number.
    """

    def __init__(
        self,
        layers: int,
        samples: int,
        tokens: int,
        *,
        first: int = 0,
        label: str = "Layer",
        quiet: bool = False,
    ) -> None:
        self._layers, self._samples, self._passed = layers, samples, 0
        self._tokens, self._first, self._quiet = tokens, first, quiet
        self._label = label

    def __enter__(self) -> Progress:  # noqa: PYI034 - Self needs Python 3.11
        size = _size()
        self._bar: tqdm[Any] = tqdm(
            total=self._tokens * self._layers,
            initial=self._tokens * self._first,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=not size,
            disable=self._quiet,
            **size,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def layer(self, index: int) -> None:
        """Layer `index` (from 0) begins."""
        self._passed = 0
        self._bar.set_description(f"{self._label} {index + 1}/{self._layers}")

    def sample(self, tokens: int) -> None:
        """A sample of that many tokens has passed the layer."""
        self._passed += 1
        self._bar.set_postfix_str(f"sample {self._passed}/{self._samples}", refresh=False)
        self._bar.update(tokens)


def _size() -> dict[str, Any]:
    """A size where the terminal says 0 x 0, as those of some containers: tqdm would show nothing.

    Empty where it has one, to follow its changes, and where there is no terminal.
    """
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return {}
    return {} if min(size) else {"ncols": 79, "nrows": 24}
