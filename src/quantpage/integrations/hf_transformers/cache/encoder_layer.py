"""Keys and values of an encoder's tokens (pictures), which every later token sees (Mllama).

They stay Transformers' own, unquantized. They come with the tokens of a forward and go with them,
however many tokens that are: Transformers would cut as many keys of pictures as tokens of text.
"""

from transformers.cache_utils import DynamicLayer


class EncoderLayer(DynamicLayer):
    """A layer of the cache that counts an encoder's tokens and not the text's."""

    def __init__(self) -> None:
        super().__init__()
        self._came: list[tuple[int, int]] = []
        """(tokens of text cached before, keys held before) of each forward that brought some."""

    def note(self, start: int, held: int) -> None:
        """A forward behind ``start`` tokens of text is over, before which ``held`` keys were."""
        if self.get_seq_length() > held:
            self._came.append((start, held))

    def forget(self, length: int) -> None:
        """Keep what came with the first ``length`` tokens of text."""
        while self._came and self._came[-1][0] >= length:
            _, held = self._came.pop()
            assert self.keys is not None and self.values is not None
            self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]

    def reset(self) -> None:
        """Forget everything: numbers set to zero would still be keys."""
        self.__init__()  # type: ignore[misc]
