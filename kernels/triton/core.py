# mypy: ignore-errors
"""Which neurons tokens vote for: of each token those of the share of its positive ones that is largest."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def token_votes(
    hidden, counted, limits, votes, tokens, counted_step, neurons,
    MASKED: tl.constexpr, MAGNITUDE: tl.constexpr, NEURONS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Adds to ``votes`` those of one token. ``NEURONS`` is ``neurons`` rounded up, of ``BITS`` bits.

    ``limits`` int32 ``[neurons + 1]``: how many are core neurons of so many positive ones.
    """
    row = (tl.program_id(0) // tokens).to(tl.int64)
    token = tl.program_id(0) % tokens
    neuron = tl.arange(0, NEURONS)
    inside = neuron < neurons
    said = tl.load(hidden + (row * tokens + token) * neurons + neuron, mask=inside, other=0.0).to(tl.float32)
    if MAGNITUDE:
        said = tl.abs(said)
    # Bits of positive numbers are in their order; what is not positive, as NaN, is 0.
    key = tl.where(said > 0, said.to(tl.int32, bitcast=True), 0)
    limit = tl.load(limits + tl.sum((key > 0).to(tl.int32), 0))
    if MASKED:
        limit = tl.where(tl.load(counted + row * counted_step + token) != 0, limit, 0)
    # The last core neuron's key, bit by bit: the largest that as many keys reach.
    last = 0
    for bit in range(31):
        tried = last | (1 << (30 - bit))
        last = tl.where(tl.sum((key >= tried).to(tl.int32), 0) >= limit, tried, last)
    # Of those that tie for the last place the first: as long a run of neurons as has not too many.
    left = limit - tl.sum((key > last).to(tl.int32), 0)
    end = 0
    for bit in range(BITS):
        tried = end | (1 << (BITS - 1 - bit))
        end = tl.where(tl.sum(((key == last) & (neuron < tried)).to(tl.int32), 0) <= left, tried, end)
    core = (key > last) | ((key == last) & (neuron < end))
    # Integers: the sum is the same in any order.
    tl.atomic_add(votes + row * neurons + neuron, 1, mask=inside & core & (limit > 0), sem="relaxed")
