"""Binary codes of token ids (BitLM, arXiv 2605.11577): id <-> {-1, +1}^K, packed bytes, nearest valid id.

An id y in [0, V) is written with K = ceil(log2 V) bits, most significant bit first; bit 1 becomes +1 and
bit 0 becomes -1: phi(y) = 2 * bin_K(y) - 1. A code map may permute the ids first; the permuted id is called
the *pattern*, and patterns are what the bits, the packed bytes and the model hold. Patterns in [V, 2^K)
belong to no id.

Legend: B batch, S sequence, n tokens of one packed run, K bits, R rows with an invalid pattern, C candidates.
"""

from __future__ import annotations

import hashlib
from typing import overload

import numpy as np
import torch
from torch import Tensor

_MAX_VOCAB_SIZE = 2**31  # patterns and bit masks are then exact in int64 with room to spare


def packed_num_bytes(num_tokens: int, num_bits: int) -> int:
    """Bytes of a packed run of ``num_tokens`` tokens of ``num_bits`` bits, zero padded to whole bytes."""
    return -(-num_tokens * num_bits // 8)


class BinaryCode:
    """Maps the ids of a vocabulary to +-1 codes and back.

    Args:
        vocab_size: V >= 2, the number of ids.
        code_map: optional permutation of range(V), integer [V]; ``code_map[id]`` is the pattern of ``id``.
            None and the identity permutation are the same code.

    Raises:
        ValueError: V < 2 or V > 2^31, or ``code_map`` is not a permutation of range(V).
    """

    def __init__(self, vocab_size: int, code_map: Tensor | np.ndarray | None = None) -> None:
        if not 2 <= vocab_size <= _MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be between 2 and {_MAX_VOCAB_SIZE}, got {vocab_size}")
        self.vocab_size = int(vocab_size)
        self.num_bits = (self.vocab_size - 1).bit_length()
        self.code_map = _checked_code_map(code_map, self.vocab_size)
        self._inverse_map: np.ndarray | None = None
        self.code_map_hash = "identity"
        if self.code_map is not None:
            self._inverse_map = np.argsort(self.code_map)
            stored = f"{self.vocab_size}:".encode() + self.code_map.astype("<i8").tobytes()
            self.code_map_hash = hashlib.sha256(stored).hexdigest()
        # One copy of the two maps per device that has been used, so that a training step copies nothing.
        self._device_maps: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"BinaryCode(vocab_size={self.vocab_size}, code_map={self.code_map_hash})"

    # ------------------------------------------------------------------ ids <-> codes

    def encode(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes phi(id): integer ids [...] -> [..., K] in {-1, +1} of ``dtype``, most significant bit first.

        Raises:
            ValueError: ids are not integers, or one lies outside [0, V).
        """
        return _pattern_bits(self._patterns(ids), self.num_bits).to(dtype).mul_(2).sub_(1)

    def decode(self, analog: Tensor) -> Tensor:
        """Nearest valid id: floating analog [..., K] -> int64 [...], argmax over ids of <analog, phi(id)>.

        The signs give the answer wherever they spell a valid pattern (0 counts as +1). Elsewhere every valid
        pattern is V-1 itself or first leaves the bits of V-1 at some position where V-1 has a 1; it then has
        a 0 there and its lower bits are free, so the best of them follow the signs. That leaves at most K + 1
        candidates. Equal scores go to the largest pattern, as counting 0 as +1 does.

        Raises:
            ValueError: the last axis is not K long, or ``analog`` holds NaN.
        """
        patterns = self._sign_patterns(analog)
        if bool(torch.isnan(analog).any()):
            raise ValueError("cannot decode analog bits that contain NaN")
        invalid = patterns >= self.vocab_size
        if bool(invalid.any()):
            patterns[invalid] = self._nearest_patterns(analog[invalid], patterns[invalid])
        return patterns if self.code_map is None else self._maps_on(patterns.device)[1][patterns]

    def is_valid(self, analog: Tensor) -> Tensor:
        """Whether the signs of analog [..., K] (0 counts as +1) spell the pattern of an id: bool [...].

        Raises:
            ValueError: the last axis is not K long.
        """
        return self._sign_patterns(analog) < self.vocab_size

    # ------------------------------------------------------------------ packed bytes

    @overload
    def pack(self, ids: Tensor) -> Tensor: ...
    @overload
    def pack(self, ids: np.ndarray) -> np.ndarray: ...
    def pack(self, ids: Tensor | np.ndarray) -> Tensor | np.ndarray:
        """Packs runs of tokens: integer ids [..., n] -> uint8 [..., ceil(n*K/8)].

        A run is one stream of n*K bits, most significant bit first, zero padded to a byte. The bytes hold
        patterns, that is ids after the code map. A numpy array gives a numpy array, a tensor a tensor on its
        device, and both the same bytes.

        Raises:
            ValueError: ids are not integers, or one lies outside [0, V).
        """
        if ids.ndim == 0:
            raise ValueError("pack needs a run of ids [..., n], got a single id")
        num_bytes = packed_num_bytes(ids.shape[-1], self.num_bits)
        if isinstance(ids, np.ndarray):
            octets = self._patterns_numpy(ids).astype(">u4")[..., None].view(np.uint8)
            bits = np.unpackbits(octets, axis=-1)[..., 32 - self.num_bits :]
            return np.packbits(bits.reshape(*ids.shape[:-1], ids.shape[-1] * self.num_bits), axis=-1)
        bit_stream = _pattern_bits(self._patterns(ids), self.num_bits).flatten(-2)
        padded = torch.nn.functional.pad(bit_stream, (0, num_bytes * 8 - bit_stream.shape[-1]))
        return _bits_to_int(padded.unflatten(-1, (num_bytes, 8))).to(torch.uint8)

    @overload
    def unpack(self, packed: Tensor, num_tokens: int, *, check: bool = ...) -> Tensor: ...
    @overload
    def unpack(self, packed: np.ndarray, num_tokens: int, *, check: bool = ...) -> np.ndarray: ...
    def unpack(self, packed: Tensor | np.ndarray, num_tokens: int, *, check: bool = True) -> Tensor | np.ndarray:
        """Inverse of ``pack``: uint8 [..., ceil(n*K/8)] -> int64 ids [..., n] with n = ``num_tokens``.

        Without ``check`` patterns are taken as they are (no device-to-host wait); of data known to be this code's.

        Raises:
            ValueError: wrong dtype or number of bytes, or a pattern that belongs to no id (foreign data).
        """
        self._check_packed(packed, num_tokens)
        if isinstance(packed, np.ndarray):
            bits = np.unpackbits(packed, axis=-1, count=num_tokens * self.num_bits)
            bits = bits.reshape(*packed.shape[:-1], num_tokens, self.num_bits)
            weights = 1 << np.arange(self.num_bits - 1, -1, -1, dtype=np.int64)
            patterns = bits @ weights
            if check:
                self._check_range(patterns, "the packed bytes hold pattern")
            return patterns if self._inverse_map is None else self._inverse_map[patterns]
        found = _bits_to_int(self._unpacked_bits(packed, num_tokens))
        if check:
            self._check_range(found, "the packed bytes hold pattern")
        return found if self.code_map is None else self._maps_on(found.device)[1][found]

    @overload
    def unpack_codes(self, packed: Tensor, num_tokens: int, dtype: torch.dtype = ...) -> Tensor: ...
    @overload
    def unpack_codes(self, packed: np.ndarray, num_tokens: int) -> np.ndarray: ...
    def unpack_codes(
        self, packed: Tensor | np.ndarray, num_tokens: int, dtype: torch.dtype = torch.float32
    ) -> Tensor | np.ndarray:
        """Codes of packed runs without going through ids: uint8 [..., ceil(n*K/8)] -> +-1 [..., n, K].

        Equal to ``encode(unpack(packed, n))``, except that patterns are not checked (no device-to-host wait).
        ``dtype`` is for tensors; numpy gives float32.

        Raises:
            ValueError: wrong dtype or number of bytes.
        """
        self._check_packed(packed, num_tokens)
        if isinstance(packed, np.ndarray):
            bits = np.unpackbits(packed, axis=-1, count=num_tokens * self.num_bits)
            codes = bits.reshape(*packed.shape[:-1], num_tokens, self.num_bits).astype(np.float32)
            return codes * 2 - 1
        return self._unpacked_bits(packed, num_tokens).to(dtype).mul_(2).sub_(1)

    # ------------------------------------------------------------------ private

    def _patterns(self, ids: Tensor) -> Tensor:
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        self._check_range(ids, "got id")
        return ids.long() if self.code_map is None else self._maps_on(ids.device)[0][ids.long()]

    def _patterns_numpy(self, ids: np.ndarray) -> np.ndarray:
        if ids.dtype.kind not in "iu":
            raise ValueError(f"ids must be integers, got {ids.dtype}")
        self._check_range(ids, "got id")
        return ids if self.code_map is None else self.code_map[ids]

    def _check_range(self, values: Tensor | np.ndarray, what: str) -> None:
        if (values.numel() if isinstance(values, Tensor) else values.size) == 0:
            return
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"{what} {low if low < 0 else high}, outside [0, {self.vocab_size})")

    def _check_packed(self, packed: Tensor | np.ndarray, num_tokens: int) -> None:
        if str(packed.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"packed codes must be uint8, got {packed.dtype}")
        expected = packed_num_bytes(num_tokens, self.num_bits)
        if packed.ndim == 0 or packed.shape[-1] != expected:
            shape = tuple(packed.shape)
            raise ValueError(f"{num_tokens} tokens of {self.num_bits} bits take {expected} bytes, got shape {shape}")

    def _maps_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(id -> pattern, pattern -> id), int64 [V] each. Only called when there is a code map."""
        if device not in self._device_maps:
            maps = torch.from_numpy(np.stack([self.code_map, self._inverse_map])).to(device)  # type: ignore[list-item]
            self._device_maps[device] = (maps[0], maps[1])
        return self._device_maps[device]

    def _unpacked_bits(self, packed: Tensor, num_tokens: int) -> Tensor:
        """uint8 [..., bytes] -> bits uint8 [..., n, K]."""
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        bit_stream = packed.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).flatten(-2)
        return bit_stream[..., : num_tokens * self.num_bits].unflatten(-1, (num_tokens, self.num_bits))

    def _sign_patterns(self, analog: Tensor) -> Tensor:
        if analog.ndim == 0 or analog.shape[-1] != self.num_bits:
            shape = tuple(analog.shape)
            raise ValueError(f"analog bits need a last axis of {self.num_bits}, got shape {shape}")
        return _bits_to_int(analog >= 0)

    def _nearest_patterns(self, analog_rk: Tensor, sign_pattern_r: Tensor) -> Tensor:
        """Best valid pattern of rows whose sign pattern is invalid: [R, K], int64 [R] -> int64 [R].

        The score of a pattern is sum |a| minus twice the |a| of the bits where it differs from the signs, so
        the best one has the least such cost; costs of the shared prefix with V-1 are one cumulative sum.
        """
        device = analog_rk.device
        last = self.vocab_size - 1
        magnitude_rk = analog_rk.detach().double().abs()
        positive_rk = analog_rk >= 0
        # Bit shifts of the ones of V-1, lowest first: a departure at a lower bit is a larger pattern, and
        # argmin returns the first minimum, so ties go to the largest pattern.
        shifts = [shift for shift in range(self.num_bits) if last >> shift & 1]
        shift_c = torch.tensor(shifts, device=device)
        position_c = self.num_bits - 1 - shift_c
        last_bits_k = _pattern_bits(torch.tensor(last, device=device), self.num_bits).bool()
        prefix_cost_rk = torch.where(positive_rk != last_bits_k, magnitude_rk, 0.0).cumsum(-1)
        last_cost_r1 = prefix_cost_rk[:, -1:]
        before_rk = torch.nn.functional.pad(prefix_cost_rk, (1, -1))  # cost of the bits above each position
        leave_cost_rk = before_rk + torch.where(positive_rk, magnitude_rk, 0.0)
        best_r = torch.cat([last_cost_r1, leave_cost_rk[:, position_c]], -1).argmin(-1)
        # A candidate keeps V-1 above the shift, has 0 at it and the signs below it.
        kept_c = torch.tensor([last] + [last >> (s + 1) << (s + 1) for s in shifts], device=device)
        free_c = torch.tensor([0] + [(1 << s) - 1 for s in shifts], device=device)
        return kept_c[best_r] | (sign_pattern_r & free_c[best_r])


def _checked_code_map(code_map: Tensor | np.ndarray | None, vocab_size: int) -> np.ndarray | None:
    """The map as int64 numpy [V]; None for the identity."""
    if code_map is None:
        return None
    array = code_map.detach().cpu().numpy() if isinstance(code_map, Tensor) else np.asarray(code_map)
    if array.shape != (vocab_size,) or array.dtype.kind not in "iu":
        raise ValueError(f"code_map must be {vocab_size} integers, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.int64)  # a copy: later changes to the argument must not reach the code
    identity = np.arange(vocab_size)
    if not np.array_equal(np.sort(array), identity):
        raise ValueError(f"code_map must be a permutation of 0 ... {vocab_size - 1}")
    return None if np.array_equal(array, identity) else array


def _pattern_bits(patterns: Tensor, num_bits: int) -> Tensor:
    """int64 [...] -> bits uint8 [..., K], most significant first."""
    shifts = torch.arange(num_bits - 1, -1, -1, dtype=torch.int32, device=patterns.device)
    return patterns.to(torch.int32).unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and_(1).to(torch.uint8)


def _bits_to_int(bits: Tensor) -> Tensor:
    """Bits [..., K], most significant first -> int64 [...]."""
    num_bits = bits.shape[-1]
    weights = 1 << torch.arange(num_bits - 1, -1, -1, dtype=torch.int64, device=bits.device)
    return (bits.long() * weights).sum(-1)
