"""Owns the blocks of the cache: hands them to requests, shares prefixes, takes them back.

Each cache group has a pool of its own, since its blocks differ in size; a policy object knows what
the group's kind needs. The manager knows block ids and hashes, never requests: a request holds a
`BlockTable` and passes it in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set

from quire.core.interface.worker import NULL_BLOCK, CacheGroup, CachePlan
from quire.core.kv_cache.block_pool import BlockPool
from quire.core.kv_cache.block_table import (
    NEVER,
    BlockTable,
    PrefixCacheStatistics,
    PrefixHit,
)
from quire.core.kv_cache.group_policy import GroupPolicy, make_group_policy
from quire.core.kv_cache.prefix_hashing import hash_blocks, hash_source, root_hash


class KVCacheManager:
    """Blocks for requests, all or nothing: too few in one group, and none is taken in any."""

    def __init__(
        self, groups: Sequence[CacheGroup], plan: CachePlan, *, enable_prefix_caching: bool = True
    ) -> None:
        assert len(groups) == len(plan.num_blocks), f"{len(groups)} groups, plan {plan}"
        self.groups = tuple(groups)
        self.enable_prefix_caching = enable_prefix_caching and bool(groups)
        self.prefix_statistics = PrefixCacheStatistics()
        self._pools = [BlockPool(num_blocks) for num_blocks in plan.num_blocks]
        self._policies: list[GroupPolicy] = [make_group_policy(group) for group in groups]
        policies = self._policies
        self._token_groups = [g for g, policy in enumerate(policies) if policy.follows_tokens]
        self._source_groups = [g for g, policy in enumerate(policies) if not policy.follows_tokens]
        assert self._token_groups or not groups, (
            f"no group follows the tokens of requests: {groups}"
        )
        self._hash_sizes = sorted({groups[group].block_size for group in self._token_groups} or {1})
        self._hashes_of_group = {
            group: self._hash_sizes.index(groups[group].block_size) for group in self._token_groups
        }
        self._tables: set[BlockTable] = set()
        self._announced: dict[bytes, BlockTable] = {}
        """Blocks of prompts, of the smallest block size, that running requests are to fill."""
        self.gives_back_early = any(policy.gives_back_early for policy in self._policies)

    # ------------------------------------------------------------------------------- questions

    @property
    def num_free_blocks(self) -> list[int]:
        """For each group, blocks that nobody holds."""
        return [pool.num_free for pool in self._pools]

    @property
    def usage(self) -> float:
        """The share of the blocks that is held, 0 to 1, of the fullest group."""
        return max(
            (1.0 - pool.num_free / max(1, pool.num_usable) for pool in self._pools), default=0.0
        )

    def can_ever_hold(self, num_tokens: int, max_chunk: int, num_source_tokens: int = 0) -> bool:
        """Whether a request that is alone can reach `num_tokens`, `max_chunk` a step at most."""
        return all(
            policy.max_held_blocks(
                num_tokens if policy.follows_tokens else num_source_tokens, max_chunk
            )
            <= pool.num_usable
            for policy, pool in zip(self._policies, self._pools, strict=True)
        )

    # ------------------------------------------------------------------------ a request's blocks

    def make_table(
        self,
        salt: str | None = None,
        extra_keys: Sequence[str] = (),
        *,
        num_source_tokens: int = 0,
    ) -> BlockTable:
        """An empty table. Prefixes are shared only between tables of the same salt and keys.

        `num_source_tokens`: what an encoder makes of that which `extra_keys` stand for.
        """
        num_groups = len(self.groups)
        root = root_hash(salt, extra_keys)
        sizes = [self.groups[group].block_size for group in self._source_groups]
        num_source_blocks = -(-num_source_tokens // min(sizes)) if sizes else 0
        return BlockTable(
            root=root,
            num_source_tokens=num_source_tokens,
            source_hashes=hash_source(root, num_source_blocks),
            block_ids=[[] for _ in range(num_groups)],
            hashes=[[] for _ in self._hash_sizes],
            num_dead=[0] * num_groups,
            num_registered=[0] * num_groups,
        )

    def find_prefix(self, table: BlockTable, token_ids: Sequence[int]) -> PrefixHit:
        """The longest prefix of `token_ids` on which all groups agree, without the last token."""
        if not self.enable_prefix_caching:
            return self.no_prefix()
        num_tokens = len(token_ids) - 1
        self._extend_hashes(table, token_ids, num_tokens)
        turn = 0
        num_agreed = 0
        while num_agreed < len(self._token_groups) and num_tokens > 0:
            group = self._token_groups[turn]
            block_size = self._policies[group].block_size
            hashes = table.hashes[self._hashes_of_group[group]]
            num_blocks = self._policies[group].longest_hit(
                self._pools[group], hashes, num_tokens // block_size
            )
            # A shorter hit must be put to the groups that agreed to the longer one again.
            num_agreed = num_agreed + 1 if num_blocks * block_size == num_tokens else 1
            num_tokens = num_blocks * block_size
            turn = (turn + 1) % len(self._token_groups)
        return PrefixHit(
            num_tokens=num_tokens,
            block_ids=self._blocks_of_prefix(table, num_tokens),
            num_pending_tokens=self._num_announced(table, num_tokens, len(token_ids) - 1),
        )

    def no_prefix(self) -> PrefixHit:
        """The hit of a request that starts from nothing."""
        return PrefixHit(num_tokens=0, block_ids=[[] for _ in self.groups])

    def admit(
        self,
        table: BlockTable,
        hit: PrefixHit,
        *,
        num_tokens: int,
        num_new_tokens: int,
        num_spare_blocks: int = 0,
    ) -> bool:
        """Gives an empty table the blocks of `hit` and of the `num_new_tokens` after it.

        Only if the whole of `num_tokens` fits and leaves `num_spare_blocks` of each group to
        others; else nothing changes and the answer is False.
        """
        assert table not in self._tables, "the table holds blocks already"
        end = hit.num_tokens + num_new_tokens
        counts = []
        for policy, pool, shared in zip(self._policies, self._pools, hit.block_ids, strict=True):
            total = num_tokens if policy.follows_tokens else table.num_source_tokens
            count = policy.num_admission_blocks(total, end) - len(shared)
            most = policy.max_held_blocks(total, num_new_tokens)
            num_held = sum(map(pool.is_held, shared))
            num_null = shared.count(NULL_BLOCK)
            taken = max(count + len(shared) - num_null, most) - num_held
            if taken + num_spare_blocks > pool.num_free:
                return False
            counts.append(count)
        self._take(table, hit, counts)
        if self.enable_prefix_caching:
            self._announce(table, hit.num_tokens, num_tokens)
            self._count_query(num_tokens, hit.num_tokens)
        return True

    def allocate(self, table: BlockTable, num_tokens: int) -> list[list[int]] | None:
        """The blocks that each group adds to the table to reach `num_tokens`; None: too few.

        Need not be called while `table.capacity` suffices.
        """
        counts = []
        for policy, pool, block_ids in zip(
            self._policies, self._pools, table.block_ids, strict=True
        ):
            total = num_tokens if policy.follows_tokens else table.num_source_tokens
            count = max(0, policy.num_blocks(total) - len(block_ids))
            if count > pool.num_free:
                return None
            counts.append(count)
        return self._append(table, counts)

    def settle(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        """Takes note that the keys and values of `num_computed` tokens have been written.

        Blocks that are full become findable; blocks that no later token can see are given back.
        Steps in flight are later, so they do not miss them. Need not be called before
        `table.next_settle_at`.
        """
        self._withdraw(table, num_computed // self._hash_sizes[0])
        if table.is_findable:
            self._register(table, token_ids, num_computed)
        self._drop_dead_blocks(table, num_computed)
        table.next_settle_at = self._next_settle_at(num_computed)

    def _register(self, table: BlockTable, token_ids: Sequence[int], num_computed: int) -> None:
        self._extend_hashes(table, token_ids, num_computed)
        self._register_source(table)
        for group in self._token_groups:
            pool = self._pools[group]
            hashes = table.hashes[self._hashes_of_group[group]]
            block_ids = table.block_ids[group]
            num_full = num_computed // self._policies[group].block_size
            for index in range(table.num_registered[group], num_full):
                if block_ids[index] != NULL_BLOCK:
                    pool.register(block_ids[index], hashes[index])
            table.num_registered[group] = num_full

    def _register_source(self, table: BlockTable) -> None:
        """Any step of the request that is done has filled what its encoder fills."""
        for group in self._source_groups:
            block_ids = table.block_ids[group]
            for index in range(table.num_registered[group], len(block_ids)):
                self._pools[group].register(block_ids[index], table.source_hashes[index])
            table.num_registered[group] = len(block_ids)

    def _next_settle_at(self, num_computed: int) -> int:
        """When the next block is full. Full blocks are all that matters for either thing."""
        if not self.enable_prefix_caching and not self.gives_back_early:
            return NEVER
        return min(size * (num_computed // size + 1) for size in self._hash_sizes)

    def free(self, table: BlockTable) -> None:
        """Takes all blocks back and leaves the table empty. The tail is evicted before the head."""
        if table not in self._tables:
            return
        self._tables.remove(table)
        self._withdraw(table, len(table.hashes[0]))
        for group, pool in enumerate(self._pools):
            pool.free([block for block in reversed(table.block_ids[group]) if block != NULL_BLOCK])
            table.block_ids[group] = []
            table.num_dead[group] = 0
            table.num_registered[group] = 0
        table.capacity = 0
        table.next_settle_at = NEVER

    def distrust(self, table: BlockTable) -> None:
        """Makes the table's blocks unfindable: what they hold may be what broke a request.

        A block that went bad in place would otherwise fail every later request with its prefix.
        """
        table.is_findable = False
        for pool, block_ids in zip(self._pools, table.block_ids, strict=True):
            for block in block_ids:
                if block != NULL_BLOCK:
                    pool.forget(block)

    def reset_prefix_cache(self) -> None:
        """Forgets what blocks hold, as after a change of weights.

        Requests that run keep their blocks, and those that they fill stay unfindable.
        """
        self._announced.clear()
        for pool in self._pools:
            pool.forget_hashes()
        for table in self._tables:
            table.is_findable = False

    # --------------------------------------------------------------------------------- helpers

    def _extend_hashes(self, table: BlockTable, token_ids: Sequence[int], num_tokens: int) -> None:
        """Hashes the blocks that the first `num_tokens` fill, as far as that is not done."""
        for block_size, hashes in zip(self._hash_sizes, table.hashes, strict=True):
            start, end = len(hashes) * block_size, num_tokens // block_size * block_size
            if start < end:
                parent = hashes[-1] if hashes else table.root
                hashes.extend(hash_blocks(token_ids[start:end], block_size, parent))

    def _blocks_of_prefix(self, table: BlockTable, num_tokens: int) -> list[list[int]]:
        tables = []
        for group, policy in enumerate(self._policies):
            if not policy.follows_tokens:
                tables.append(self._blocks_of_source(table, group))
                continue
            num_dead = policy.num_dead_blocks(num_tokens)
            hashes = table.hashes[self._hashes_of_group[group]]
            found = [
                self._pools[group].find(block_hash)
                for block_hash in hashes[num_dead : num_tokens // policy.block_size]
            ]
            blocks = [block for block in found if block is not None]
            assert len(blocks) == len(found), f"group {group} lacks blocks of a hit: {found}"
            tables.append([NULL_BLOCK] * num_dead + blocks)
        return tables

    def _blocks_of_source(self, table: BlockTable, group: int) -> list[int]:
        """What an earlier request's encoder has filled: all of it, or nothing."""
        count = self._policies[group].num_blocks(table.num_source_tokens)
        found = [self._pools[group].find(key) for key in table.source_hashes[:count]]
        blocks = [block for block in found if block is not None]
        return blocks if len(blocks) == count else []

    def _num_announced(self, table: BlockTable, start: int, end: int) -> int:
        """How many tokens from `start` on, in full blocks before `end`, somebody is computing."""
        size, hashes = self._hash_sizes[0], table.hashes[0]
        index = start // size
        while index < end // size and hashes[index] in self._announced:
            index += 1
        return max(0, index * size - start)

    def _announce(self, table: BlockTable, start: int, end: int) -> None:
        table.num_settled = start // self._hash_sizes[0]
        for block_hash in table.hashes[0][table.num_settled : (end - 1) // self._hash_sizes[0]]:
            self._announced.setdefault(block_hash, table)

    def _withdraw(self, table: BlockTable, num_settled: int) -> None:
        """Blocks up to here are filled, or never will be."""
        for block_hash in table.hashes[0][table.num_settled : num_settled]:
            if self._announced.get(block_hash) is table:
                del self._announced[block_hash]
        table.num_settled = num_settled

    def _take(self, table: BlockTable, hit: PrefixHit, counts: list[int]) -> None:
        self._tables.add(table)
        for group, pool in enumerate(self._pools):
            shared = hit.block_ids[group]
            for block in shared:
                if block != NULL_BLOCK:
                    pool.share(block)
            table.block_ids[group] = list(shared)
            table.num_dead[group] = shared.count(NULL_BLOCK)
            table.num_registered[group] = len(shared)
        self._append(table, counts)
        table.is_findable = self.enable_prefix_caching
        table.next_settle_at = self._next_settle_at(hit.num_tokens)
        table.has_shared_source = bool(self._source_groups) and all(
            bool(hit.block_ids[group]) and not counts[group] for group in self._source_groups
        )
        if self.enable_prefix_caching and table.num_source_tokens and not table.has_shared_source:
            table.next_settle_at = 1  # its first step fills what others may share

    def _append(self, table: BlockTable, counts: list[int]) -> list[list[int]]:
        added = []
        capacity = NEVER
        for group, (pool, count) in enumerate(zip(self._pools, counts, strict=True)):
            blocks = pool.allocate(count)
            block_ids = table.block_ids[group]
            block_ids += blocks
            added.append(blocks)
            if self._policies[group].follows_tokens:
                capacity = min(capacity, len(block_ids) * self._policies[group].block_size)
        table.capacity = capacity
        return added

    def _drop_dead_blocks(self, table: BlockTable, num_computed: int) -> None:
        for group, policy in enumerate(self._policies):
            first = table.num_dead[group]
            num_dead = policy.num_dead_blocks(num_computed)
            if num_dead > first:
                block_ids = table.block_ids[group]
                self._pools[group].free(block_ids[first:num_dead])
                block_ids[first:num_dead] = [NULL_BLOCK] * (num_dead - first)
                table.num_dead[group] = num_dead

    def _count_query(self, num_tokens: int, num_hit_tokens: int) -> None:
        self.prefix_statistics.num_requests += 1
        self.prefix_statistics.num_query_tokens += num_tokens
        self.prefix_statistics.num_hit_tokens += num_hit_tokens

    def check_integrity(self, holders: Set[BlockTable] | None = None) -> None:
        """Recomputes all counts from the tables; AssertionError names what is wrong.

        `holders`, where given, are all the tables that may hold blocks: any other has leaked.
        """
        if holders is not None:
            assert self._tables <= holders, f"{len(self._tables - holders)} tables leaked"
        for group, pool in enumerate(self._pools):
            num_holders: Counter[int] = Counter()
            for table in self._tables:
                held = [block for block in table.block_ids[group] if block != NULL_BLOCK]
                assert len(set(held)) == len(held), f"a table holds a block twice: {held}"
                num_holders.update(held)
            pool.check_integrity(num_holders)
        for table in self._tables:
            self._check_table(table)
        for table in self._announced.values():
            assert table in self._tables, "a request that holds nothing is announced"

    def _check_table(self, table: BlockTable) -> None:
        capacity = min(
            (
                len(block_ids) * policy.block_size
                for block_ids, policy in zip(table.block_ids, self._policies, strict=True)
                if policy.follows_tokens
            ),
            default=NEVER,
        )
        assert table.capacity == capacity, f"capacity {table.capacity}, blocks for {capacity}"
        for group, num_dead in enumerate(table.num_dead):
            block_ids = table.block_ids[group]
            assert all(block == NULL_BLOCK for block in block_ids[:num_dead]), block_ids
            assert all(block != NULL_BLOCK for block in block_ids[num_dead:]), block_ids
