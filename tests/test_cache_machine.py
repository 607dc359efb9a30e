"""Random lives of a cache against a plain model of it: a list of tokens per row, quantised by the definition.

The model keeps what was given and nothing else, so each state is checked as if its tokens had come at once: whatever
was appended, removed, repeated, selected, permuted, copied or started anew, and in whichever order.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stores import plain

import effcompile as ec
from effcompile.kernels import ops
from effcompile.kernels.form import KVForm
from effcompile.runtime.cache import CacheError
from effcompile.runtime.layer import REACH

HEADS, SIZE, CAPACITY = 1, 16, 512
FORMS = [KVForm(4, 4, 16, 0), KVForm(8, 4, 16, 16), KVForm(4, 16, 16, 32), KVForm(16, 8, 16, 16), KVForm(16, 16, 16, 0)]
FORMS += [KVForm(4, 8, 16, 16, "token", "channel"), KVForm("fp8", 2, 16, 0, "channel", "channel")]
FORMS += [KVForm(8, "fp8", 16, 32, "token")]
HEAD = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": SIZE}
MODEL = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, vocab_size=8, **HEAD)
)


class Lives(RuleBasedStateMachine):
    """One cache of two layers, and what it should hold."""

    reference = False

    @initialize(
        form=st.sampled_from(FORMS), batch=st.integers(1, 3), prompt=st.integers(0, 300), seed=st.integers(0, 2**31)
    )
    def start(self, form, batch, prompt, seed):
        """A prompt to begin with: most of what can go wrong needs more tokens than the ring has slots."""
        self.random = torch.Generator().manual_seed(seed)
        self.form, self.batch, self.recording = form, batch, False
        self.cache = ec.Cache(MODEL, CAPACITY, **form.options)
        self.tokens = torch.zeros(batch, HEADS, 0, SIZE)
        self.safe = 0  # newest tokens appended since the recording began, undisturbed, as far as it reaches back
        self.append(prompt, True)

    def mode(self):
        return ops.reference_only() if self.reference else contextlib.nullcontext()

    @property
    def length(self):
        return self.tokens.shape[2]

    @rule(count=st.one_of(st.integers(1, 6), st.integers(1, 70), st.integers(60, 200)), announced=st.booleans())
    def append(self, count, announced):
        count = min(count, CAPACITY - self.length)
        if not count:
            return
        new = torch.randn(self.batch, HEADS, count, SIZE, generator=self.random)
        with self.mode():
            if announced:
                self.cache.prepare(self.batch, count, torch.float32)
            for index in range(2):
                self.cache.update(new * (index + 1), new - index, index)
        self.safe = min(self.safe + count, REACH) if self.recording and announced else 0
        self.tokens = torch.cat([self.tokens, new], 2)

    @rule(data=st.data())
    def reorder(self, data):
        order = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        self.cache.reorder_cache(torch.tensor(order))
        self.tokens, self.safe = self.tokens[order], 0

    @precondition(lambda self: self.batch <= 3 and self.length)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.tokens, self.safe = self.tokens.repeat_interleave(repeats, 0), 0
        self.batch *= repeats

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def select(self, data):
        rows = data.draw(st.lists(st.integers(-self.batch, self.batch - 1), min_size=1, max_size=4))
        self.cache.batch_select_indices(torch.tensor(rows))
        self.tokens, self.safe = self.tokens[rows], 0
        self.batch = len(rows)

    @precondition(lambda self: self.length)
    @rule(data=st.data(), near=st.booleans())
    def crop(self, data, near):
        count = data.draw(st.integers(1, min(self.length, 20) if near else self.length))
        if count < self.length and count > self.cache.removable:
            with pytest.raises(CacheError, match=f"the newest {self.cache.removable} can be removed"):
                self.cache.crop(-count)
            return
        self.cache.crop(-count)
        self.tokens = self.tokens[:, :, : self.length - count]
        self.safe = max(0, self.safe - count)

    @precondition(lambda self: self.length > 2 * self.form.slots)
    @rule(times=st.integers(1, 3))
    def crop_the_most(self, times):
        """What is left may have less that can go: the ring does not get back what removed tokens took over."""
        for _ in range(times):
            count = self.cache.removable
            if count < self.length:
                self.cache.crop(-count)
                self.tokens = self.tokens[:, :, : self.length - count]
                self.safe = max(0, self.safe - count)
                self.holds_what_was_given()

    @rule()
    def record(self):
        self.cache.activate_past_recording()
        self.recording = True

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        self.batch, self.safe = batch, 0
        self.tokens = torch.zeros(batch, HEADS, 0, SIZE)

    @rule()
    def copy(self):
        """Go on with a copy; what is done to the original must not reach it."""
        original, self.cache = self.cache, copy.deepcopy(self.cache)
        for layer in original.compressed:
            for buffer in layer.buffers():
                buffer.fill_(77)
        original.length.fill_(3)
        original.call.sent = 1

    @rule()
    def another_batch_is_refused(self):
        """Before anything else is looked at: a full cache says the same."""
        if self.length:
            with pytest.raises(CacheError, match=f"a batch of {self.batch} and this call has {self.batch + 1}"):
                self.cache.prepare(self.batch + 1, 1, torch.float32)
            with pytest.raises(CacheError, match="number of beams cannot change"):
                self.cache.reorder_cache(torch.zeros(self.batch + 1, dtype=torch.long))

    @invariant()
    def holds_what_was_given(self):
        assert self.cache.tokens == self.length
        assert self.cache.call.sent in (None, self.length)
        for index, layer in enumerate(self.cache.compressed):
            if not self.length:
                assert layer.fresh
                continue
            with self.mode():
                got = torch.ops.effcompile.kv_load(*layer.state, self.cache.length, layer.form_name)
            given = self.tokens * (index + 1), self.tokens - index
            for kind, x, y in zip(("key", "value"), got, given):
                assert x.shape[0] == self.batch
                assert torch.equal(x[:, :, : self.length], plain(y, self.form, kind))
                assert not x[:, :, self.length :].any()

    @invariant()
    def says_truly_how_much_can_go(self):
        """At least what the form's own lengths allow, and at least what was recorded."""
        if self.length:
            removable = self.cache.removable
            least = self.length if self.form.dense else self.length - self.form.packed(self.length) - self.form.residual
            assert max(least, self.safe) <= removable <= self.length
            assert self.cache.is_croppable == self.form.dense


class LivesOnReferenceBodies(Lives):
    """The same without a kernel."""

    reference = True


def _run(machine: type[Lives], examples: int) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("machine", [Lives, LivesOnReferenceBodies], ids=["kernels", "reference"])
def test_lives_of_a_cache(machine: type[Lives]) -> None:
    _run(machine, 75)


@pytest.mark.exhaustive
@pytest.mark.parametrize("machine", [Lives, LivesOnReferenceBodies], ids=["kernels", "reference"])
def test_many_lives_of_a_cache(machine: type[Lives]) -> None:
    _run(machine, 2600)
