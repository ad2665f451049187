"""Reading pages: what stands at the positions of a request, and whether it is what was written."""

from dataclasses import dataclass

import numpy as np
import torch

from quantpage.cache import LayerKV, QuantizedPages

from .in_turn import check_in_turn
from .keys import Rows, Turn
from .numbers import LARGEST16, Mismatch, Spec, check_close, check_codes, decode, finite

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 0.0, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


@dataclass(frozen=True, slots=True)
class Half:
    """The planes of keys, or values, on the host."""

    spec: Spec
    codes: np.ndarray
    scale: np.ndarray | None
    zero: np.ndarray | None
    exact: "np.ndarray | Half | None"
    """Numbers, or codes of a finer format in the same basis."""

    @classmethod
    def of(
        cls, spec: Spec, pages: QuantizedPages, exact: torch.Tensor | QuantizedPages | None
    ) -> "Half":
        """A copy of what the layer holds now."""
        if isinstance(exact, QuantizedPages):
            near: np.ndarray | Half | None = cls.of(Spec("int8", spec.rotated), exact, None)
        else:
            near = _numbers(exact)
        return cls(spec, host(pages.codes), _numbers(pages.scale), _numbers(pages.zero), near)

    def at(self, table: list[int], positions: np.ndarray, size: int):
        """Codes as numbers, scale and zero of these positions: [tokens, heads, ..]."""
        page = np.array(table, dtype=np.int64)[positions // size]
        offset = positions % size
        codes = decode(self.spec, self.codes[page, :, offset])
        planes = []
        for plane in (self.scale, self.zero):
            if plane is None:
                planes.append(None)
            elif self.spec.given:
                planes.append(plane[None])
            else:
                planes.append(plane[page, :, offset])
        return codes, *planes

    def numbers(self, table: list[int], positions: np.ndarray, size: int) -> np.ndarray:
        """What the codes stand for."""
        codes, scale, zero = self.at(table, positions, size)
        if scale is None:
            return codes
        with np.errstate(invalid="ignore", over="ignore"):
            return codes * scale + (0.0 if zero is None else zero)

    def exactly(self, table: list[int], positions: np.ndarray, size: int) -> np.ndarray:
        """What the exact pages hold."""
        assert self.exact is not None
        if isinstance(self.exact, Half):
            return self.exact.numbers(table, positions, size)
        return self.exact[np.array(table, dtype=np.int64)[positions // size], :, positions % size]

    def check(
        self,
        rows: Rows,
        table: list[int],
        exact_table: list[int],
        size: int,
        kind: tuple[str, str],
        turn: Turn | None = None,
    ) -> None:
        """rows: what a request has written, from position 0 on. kind: dtype of the model, whose.

        turn: by what they were rounded in turn; None: each channel by itself.
        """
        dtype, where = kind
        positions = np.flatnonzero(held(table, len(rows.x), size))
        own = rows[positions]
        codes, scale, zero = self.at(table, positions, size)
        if scale is None:
            _check_kept(codes, own, dtype, where)
        elif turn is not None:
            check_in_turn(self.spec, own, codes, (scale, zero), turn, where)
        else:
            check_codes(self.spec, own.x, own.slack, codes, scale, zero, where)
        if isinstance(self.exact, Half):
            self.exact.check(rows, exact_table, [], size, (dtype, f"{where}, exact"), turn)
        elif self.exact is not None:
            positions = np.flatnonzero(held(exact_table, len(rows.x), size))
            own = rows[positions]
            limit = LARGEST16 if dtype == "float16" else float(torch.finfo(torch.float32).max)
            clipped = Rows(np.clip(finite(own.x), -limit, limit), own.slack)
            kept = self.exactly(exact_table, positions, size)
            _check_kept(kept, clipped, dtype, f"{where}, exact")


def held(table: list[int], length: int, size: int) -> np.ndarray:
    """Which positions have a page."""
    if not length:
        return np.zeros(0, bool)
    return np.array(table, dtype=np.int64)[np.arange(length) // size] >= 0


def host(plane: torch.Tensor) -> np.ndarray:
    """Codes as they are stored; floats in float64."""
    plane = plane.detach().cpu()
    if plane.dtype == torch.float8_e4m3fn:
        return plane.view(torch.uint8).numpy()
    return plane.double().numpy() if plane.is_floating_point() else plane.numpy()


def _numbers(plane: torch.Tensor | None) -> np.ndarray | None:
    return None if plane is None else plane.detach().cpu().double().numpy()


def _check_kept(got: np.ndarray, rows: Rows, dtype: str, where: str) -> None:
    number = np.isfinite(rows.x)
    if not np.array_equal(np.isfinite(got), number):
        raise Mismatch(f"{where}: which numbers are finite differs")
    x = np.where(number, rows.x, 0.0)
    loose = EPS[dtype] / 2 * np.abs(x) + TINY[dtype] + rows.slack
    got = np.where(number, got, 0.0)
    check_close(np.abs(got - x) - loose, got, x, f"{where}: number")


def poison(layer: LayerKV) -> None:
    """Memory that nobody wrote may hold anything."""
    near = (layer.exact_key, layer.exact_value)
    for half in (layer.key, layer.value, *near):
        if not isinstance(half, QuantizedPages):
            if half is not None:
                half.fill_(torch.nan)
            continue
        codes = half.codes
        if codes.is_floating_point() and codes.dtype != torch.float8_e4m3fn:
            codes.fill_(torch.nan)
        else:
            codes.view(torch.uint8).fill_(0x7F)
        if half.spec.dynamic:
            for plane in (half.scale, half.zero):
                if plane is not None:
                    plane.fill_(torch.nan)
