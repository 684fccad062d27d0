"""One case on one device: its inputs, made once, and the passes of contenders over them."""

import torch
from torch import Tensor

from bench.cases import FORWARD, HALF, Case, make_inputs
from bench.registry import Call, Outputs
from bench.timing import PeakMemory


class Stage:
    """The inputs of a case; after `run` with a backward pass its leaves hold their gradients."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        self.full = make_inputs(case, device)
        self.half = self.full.without_gradient_in_half()
        # contenders that overwrite their inputs start from these again
        self._pristine = [] if case.width else [leaf.detach().clone() for leaf in self.full.leaves]

    def inputs(self, pass_: str):
        return self.half if pass_ == HALF else self.full

    def setup(self, destroyed: bool) -> None:
        """Drops the gradients, and restores the inputs if the contender overwrites them."""
        for leaf in self.full.leaves:
            leaf.grad = None
        if destroyed:
            with torch.no_grad():
                for leaf, value in zip(self.full.leaves, self._pristine):
                    leaf.copy_(value)

    def run(self, call: Call, pass_: str) -> Outputs:
        """Runs one pass and returns logp and the entropy."""
        inputs = self.inputs(pass_)
        if pass_ == FORWARD:
            with torch.no_grad():
                return call(inputs)
        logp, entropy = call(inputs)
        self._backward(logp, entropy, pass_)
        return logp.detach(), None if entropy is None else entropy.detach()

    def _backward(self, logp: Tensor, entropy: Tensor | None, pass_: str) -> None:
        inputs = self.inputs(pass_)
        outputs = [(logp, inputs.grad_logp)]
        if entropy is not None:
            outputs.append((entropy, inputs.grad_entropy))
        torch.autograd.backward([o for o, _ in outputs], [g.to(o.dtype) for o, g in outputs])

    def peak_extra(self, call: Call, destroys: bool, pass_: str) -> int:
        """Returns the peak extra memory of one pass after a warm-up, in bytes, without the leaves' gradients.

        Forward and backward are measured separately, because the gradients exist only in the backward pass.
        """
        self.setup(destroys)
        self.run(call, pass_)
        self.setup(destroys)
        with PeakMemory(self.device) as forward, torch.set_grad_enabled(pass_ != FORWARD):
            logp, entropy = call(self.inputs(pass_))
        if pass_ == FORWARD:
            return forward.bytes
        with PeakMemory(self.device) as backward:
            self._backward(logp, entropy, pass_)
        kept = [(leaf, leaf.grad) for leaf in self.full.leaves if leaf.grad is not None]
        gradients = sum(grad.nbytes for leaf, grad in kept if grad.data_ptr() != leaf.data_ptr())
        self.setup(destroys)
        return max(forward.bytes, backward.peak - forward.before - gradients)
