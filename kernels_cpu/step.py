"""What one step asks of layers: whose rows are whose, where keys go, and whose states go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quire.kernels_cpu import checks, native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

if native.HAVE_NATIVE:
    from quire.kernels_cpu import _cpu


class Step:
    """What one step asks of attention: whose rows are whose, and where keys go.

    query_start_loc int32 [R + 1], seq_lens int32 [R], block_table int32 [R, max_blocks],
    slot_mapping int64 [T]: see `paged_attention` and `write_cache`. Keeps them alive.
    Raises: ValueError, TypeError.
    """

    __slots__ = ("_kept", "handle", "num_tokens")

    def __init__(
        self, query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor
    ) -> None:
        native.require_native()
        num_requests, self.num_tokens = seq_lens.shape[0], slot_mapping.shape[0]
        checks.check_table("block_table", block_table)
        checks.check_list("seq_lens", seq_lens, "int32")
        checks.check_list("query_start_loc", query_start_loc, "int32", num_requests + 1)
        checks.check_list("slot_mapping", slot_mapping, "int64")
        if block_table.shape[0] < num_requests:
            raise ValueError(
                f"block_table has {block_table.shape[0]} rows for {num_requests} requests"
            )
        self._kept = (query_start_loc, seq_lens, block_table, slot_mapping)
        self.handle = _cpu.Step(
            query_start_loc.data_ptr(),
            seq_lens.data_ptr(),
            block_table.data_ptr(),
            slot_mapping.data_ptr(),
            (num_requests, self.num_tokens, block_table.shape[1], block_table.stride(0)),
        )


class Pieces:
    """Pieces of a step that do not wait for one another, and where their states lie.

    Piece s is rows [begins[s], ends[s]) of the flat batch, int32 [S]; it starts from the state in
    block sources[s], from zeros where that is negative, and leaves its last in targets[s],
    int64 [S]. Keeps them alive. Raises: ValueError, TypeError.
    """

    __slots__ = ("_kept", "addresses")

    def __init__(self, begins: Tensor, ends: Tensor, sources: Tensor, targets: Tensor) -> None:
        count = len(begins)
        for name, tensor, dtype in (
            ("begins", begins, "int32"),
            ("ends", ends, "int32"),
            ("sources", sources, "int64"),
            ("targets", targets, "int64"),
        ):
            checks.check_list(name, tensor, dtype, count)
        self._kept = (begins, ends, sources, targets)
        self.addresses = (*(tensor.data_ptr() for tensor in self._kept), count)


class Rounds:
    """What one step asks of mixers: pieces, one round after the other.

    Rows of no piece are undefined in the result. Keeps the pieces alive.
    """

    __slots__ = ("_kept", "handle", "num_tokens")

    def __init__(self, rounds: Sequence[Pieces], num_tokens: int) -> None:
        native.require_native()
        self._kept = tuple(rounds)
        self.num_tokens = num_tokens
        self.handle = _cpu.Rounds([pieces.addresses for pieces in rounds], num_tokens)
