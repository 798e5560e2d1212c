"""A pruned student's matrices refitted, layer by layer, to what the teacher computes from its whole width.

Teacher and student run side by side over calibration tokens, each on its own residual stream; what earlier layers of
the student have lost is seen by later ones, which make up for it as far as they can. With n what the student's norm
gives, z what the teacher's does, a what the last matrix of a block sees in the student::

    T  = argmin Σ |T n − z|²,     W' = W T          matrices that read the stream (queries, keys, values, gate, up)
    W' = argmin Σ |W' a − (h − x)|²                 matrices that write to it, W shrunk towards its kept part

h is the teacher's stream after the block, x the student's before it, both on the channels that stay. The head of its
own reads as any other; one that is tied to the embedding E leaves only the last norm's gain g (D',) to fit, by
the squared error of the logits, up to what is the same for all of them::

    min_g Σ |E' (g ∘ n) − E z|²:     (E'ᵀE' ∘ Σ n nᵀ) g = diag(E'ᵀE Σ z nᵀ)

All from second moments, as in moments.py; where nothing was lost, nothing changes. What experts write stays as it is.

On the bundled teacher at 75 % of the hidden size and the FFNs, KL before distillation .555; with T a gain per channel
in the place of a matrix .783, without T .775; h − x replaced by what the teacher's block adds .569 against .539 (more
tokens); FFN channels by Minitron's importance in the place of channels.obs_order .579.

Shapes: D hidden size, D' the student's, I' its FFN channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.blocks.channels import obs_order
from puzzle.blocks.layer import captured_calls, output_projection
from puzzle.blocks.moments import Moments, exact_device, ridge, solve_shrunk, token_weights
from puzzle.blocks.prune import Kept, scaled_gain
from puzzle.blocks.stream import InMemory, Store
from puzzle.data.batches import Batch
from puzzle.modeling import PuzzleDecoderLayer
from puzzle.ranks import AddUp, alone
from puzzle.space import PARTS
from puzzle.teacher import Context, Teacher, attention_delta, run_layer
from puzzle.types import Part

READERS: dict[Part, tuple[str, ...]] = {
    "attention": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "ffn": ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.gate.weight", "mlp.experts.gate_up_proj"),
}

Seen = Iterable[tuple[Tensor, Tensor, Tensor]]  # what the student's norm gives, what the teacher's does, token weights


@dataclass
class SideBySide:
    """A teacher and its student on the same batches, at the same layer.

    ``own`` holds the student's stream before the block that is next, (B, T, D'), of whose channels ``kept`` (D',) are
    the teacher's (None: all); ``before``, ``middle`` and ``after`` the teacher's around both blocks of the layer.
    ``add_up``: over the processes that have the other batches; each of them makes the same student.
    """

    teacher: Teacher
    batches: Sequence[Batch]
    kept: Tensor | None
    add_up: AddUp = alone
    own: Store = field(default_factory=InMemory)
    before: Store = field(default_factory=InMemory)
    middle: Store = field(default_factory=InMemory)
    after: Store = field(default_factory=InMemory)

    def __post_init__(self) -> None:
        for index, batch in enumerate(self.batches):
            hidden = self.teacher.embed(batch).float()
            self.after.write(index, hidden)
            self.own.write(index, self.kept_of(hidden))

    def kept_of(self, hidden: Tensor) -> Tensor:
        """The channels of (..., D) that the student has."""
        return hidden if self.kept is None else hidden[..., self.kept.to(hidden.device)]

    @torch.no_grad()
    def enter(self, layer: PuzzleDecoderLayer, with_order: bool = False) -> Tensor | None:
        """The teacher goes through its next layer. ``with_order``: and its FFN's channels (I,) come back, those first
        whose loss the others could make up for least (channels.obs_order)."""
        self.before, self.after = self.after, self.before
        down = output_projection(layer, "ffn") if with_order else None
        seen = None if down is None else Moments.zeros(down.in_features, 0, down.weight.device)
        with captured_calls(layer.mlp if down is None else down) as calls:
            for index in range(len(self.batches)):
                one = run_layer(layer, self._at(self.before, index), self._context(index))
                self.middle.write(index, one.middle)
                self.after.write(index, one.after)
                given = calls.pop()[0]
                if seen is not None:
                    seen.add(given, None, token_weights(one.middle))
        if seen is None or down is None:
            return None
        seen.add_up_by(self.add_up)
        seen.check_finite()
        return obs_order(seen.gram, down.weight, ridge(down.in_features, seen.num_tokens))

    @torch.no_grad()
    def refit(self, layer: PuzzleDecoderLayer, teacher: PuzzleDecoderLayer, kept: Kept) -> None:
        """Refits the student's ``layer`` in place, which has ``kept`` of the teacher's, and goes through it."""
        for part in PARTS:
            own, other = layer.norm_of(part), teacher.norm_of(part)
            assert own is not None and other is not None
            seen = ((own(hidden), other(before), weights) for hidden, before, _, weights in self._around(part))
            to_teacher = self._lift(seen)
            for name, parameter in layer.named_parameters():
                if name in READERS[part]:
                    rows = kept.cut(name, teacher.get_parameter(name), layer.config.head_dim, leave="hidden")
                    parameter.copy_((rows.to(to_teacher) @ to_teacher).to(parameter))
            if part == "attention" or hasattr(layer.mlp, "down_proj"):
                self._refit_output(layer, teacher, part)
            if (norm := layer.post_norm_of(part)) is not None:
                self._refit_post_norm(layer, norm, part)
            for index in range(len(self.batches)):
                hidden = self._at(self.own, index)
                self.own.write(index, hidden + self._delta(layer, part, hidden, index))

    @torch.no_grad()
    def refit_ends(self, ends: dict[str, Tensor], norm: nn.Module) -> dict[str, Tensor]:
        """Behind all layers, ``ends`` with another head or, where that is tied, another gain of the last norm.

        ``norm`` is the student's last one, with the gain in ``ends``.
        """
        top = self.teacher.top
        both = ((self._at(self.own, index), self._at(self.after, index)) for index in range(len(self.batches)))
        seen = ((norm(own), top.model.norm(hidden), token_weights(hidden)) for own, hidden in both)
        head = top.lm_head.weight
        if "lm_head.weight" in ends:
            to_teacher = self._lift(seen)
            return {**ends, "lm_head.weight": (head.to(to_teacher) @ to_teacher).to(head)}
        moments = self._moments(seen)
        own, other = (
            one.to(moments.gram) - one.to(moments.gram).mean(0) for one in (ends["model.embed_tokens.weight"], head)
        )
        normal = (own.T @ own) * moments.gram
        wanted = ((own.T @ other) * moments.cross).sum(1)
        as_it_is = torch.ones_like(wanted)[None]
        factor = solve_shrunk(normal, wanted[:, None], as_it_is, ridge(len(wanted), moments.num_tokens))[0]
        gain = ends["model.norm.weight"]
        return {**ends, "model.norm.weight": scaled_gain(gain, self.teacher.config, factor.to(gain))}

    def _at(self, store: Store, index: int) -> Tensor:
        return store.read(index).to(self.teacher.device)

    def _context(self, index: int) -> Context:
        return self.teacher.context(self.batches[index])

    def _around(self, part: Part) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each batch: the student's stream before the block, the teacher's before and after it, token weights."""
        ends = (self.before, self.middle) if part == "attention" else (self.middle, self.after)
        for index in range(len(self.batches)):
            before, after = (self._at(store, index) for store in ends)
            yield self._at(self.own, index), before, after, token_weights(self._at(self.middle, index))

    def _delta(self, layer: PuzzleDecoderLayer, part: Part, hidden: Tensor, index: int) -> Tensor:
        """What a block adds to a stream of batch ``index``."""
        return layer.ffn_delta(hidden) if part == "ffn" else attention_delta(layer, hidden, self._context(index))

    def _refit_output(self, layer: PuzzleDecoderLayer, teacher: PuzzleDecoderLayer, part: Part) -> None:
        """The block's last matrix. Where a norm follows, it is fitted to what the teacher's norm is given, and a token
        counts by ``1 / rms²`` of that, as its error does behind the norm."""
        last, other = output_projection(layer, part), output_projection(teacher, part)
        moments = Moments.zeros(last.in_features, last.out_features, last.weight.device)
        bias = 0.0 if last.bias is None else last.bias
        with captured_calls(last) as own, captured_calls(other) as others:
            for index, (hidden, before, after, weights) in enumerate(self._around(part)):
                target = self.kept_of(after) - hidden
                if layer.post_norm_of(part) is not None:
                    self._delta(teacher, part, before, index)
                    output = others.pop()[1]
                    target = self.kept_of(output)
                    weights = weights / output.square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
                self._delta(layer, part, hidden, index)
                moments.add(own.pop()[0], target - bias, weights)
        moments.add_up_by(self.add_up)
        moments.check_finite()
        last.weight.copy_(moments.fit(last.weight).to(last.weight))

    def _refit_post_norm(self, layer: PuzzleDecoderLayer, norm: Any, part: Part) -> None:
        """The gain of the norm behind a block, channel by channel, by what is to be added to the stream."""
        like = norm.weight.new_zeros(2, layer.config.hidden_size)
        sums = like.to(exact_device(like.device), torch.float64)
        for index, (hidden, _, after, weights) in enumerate(self._around(part)):
            added = self._delta(layer, part, hidden, index)
            products = torch.stack([added * (self.kept_of(after) - hidden), added * added])  # (2, B, T, D')
            sums += (weights[..., None] * products).sum((1, 2)).to(sums)
        self.add_up([sums])
        factor = torch.where(sums[1] > 0, sums[0] / sums[1], 1.0)
        norm.weight.copy_(scaled_gain(norm.weight, layer.config, factor.to(norm.weight)))

    def _moments(self, seen: Seen) -> Moments:
        moments: Moments | None = None
        for own, other, weights in seen:
            moments = moments or Moments.zeros(own.shape[-1], other.shape[-1], own.device)
            moments.add(own, other, weights)
        assert moments is not None
        moments.add_up_by(self.add_up)
        moments.check_finite()
        return moments

    def _lift(self, seen: Seen) -> Tensor:
        """T (D, D'), shrunk towards the channels that stay as they are, and nothing of the others."""
        moments = self._moments(seen)
        own, other = moments.cross.shape
        stays = torch.arange(other) if self.kept is None else self.kept.cpu()
        prior = torch.zeros(other, own).index_put((stays, torch.arange(own)), torch.ones(()))
        return moments.fit(prior)
