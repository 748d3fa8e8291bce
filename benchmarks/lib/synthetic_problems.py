"""Synthetic training steps of any length: chain, U-net, dense residual, random layers.

The shapes of the graphs are those of real models; sizes and seconds are drawn around what the profiler measures
for real ones (a matrix product takes 5e-10 s per byte of output, an elementwise op 3e-11). The same arguments
give the same problem. ``n_ops`` counts forward and backward ops together; problems have about as many.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from fxhybrid.ir.problem import CodecOption, Fusion, Op, Problem, Tensor, check_problem

MIB = 1 << 20
CODEC_SHARE = 0.8  # of the float tensors that backward reads


class _Model:
    """Forward ops as they are called, with what the backward pass of each reads."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.tensors: list[Tensor] = []
        self.forward: list[Op] = []
        self.backward: list[Op] = []
        self.gradients: list[int] = []
        # forward op, inputs that want a gradient, tensors that its backward op reads, parameter bytes
        self.tape: list[tuple[int, tuple[int, ...], tuple[int, ...], int]] = []
        self.n_backward = 0

    def tensor(self, size_bytes: int) -> int:
        self.tensors.append(Tensor(f"t{len(self.tensors)}", size_bytes))
        return len(self.tensors) - 1

    def offer_codecs(self, t: int) -> None:
        """Rows of 8 and 4 bits, where a share of the tensors takes them."""
        tensor = self.tensors[t]
        if tensor.codecs or self.random.random() > CODEC_SHARE:
            return
        size, error = tensor.size_bytes, 10 ** self.random.uniform(-4.3, -3.0)
        encode_s, decode_s = 1e-4 + 4e-11 * size, 1e-5 + 1e-11 * size
        options = tuple(
            CodecOption(
                f"rowwise{bits}", size * bits // 31, encode_s, decode_s, size * (bits + 4) // 31, size, False, e
            )
            for bits, e in ((8, error), (4, 17 * error))
        )
        self.tensors[t] = Tensor(tensor.name, size, options)

    def record(self, call: tuple[int, tuple[int, ...], tuple[int, ...], int]) -> None:
        """Notes a call that has a backward pass, and how many ops that makes."""
        _, inputs, reads, weight = call
        self.tape.append(call)
        self.n_backward += 1 + (weight > 0) if reads else len(inputs) - 1

    @property
    def n_ops(self) -> int:
        """About how many ops there will be once the backward pass is written."""
        return len(self.forward) + self.n_backward

    def op(self, name: str, inputs: tuple[int, ...], size: int, s_per_byte: float, *, rise: float = 1.0) -> int:
        out = self.tensor(size)
        seconds = 3e-6 + s_per_byte * size * self.random.uniform(0.7, 1.4)
        self.forward.append(Op(f"{name}.{len(self.forward)}", inputs, (out,), seconds, int(rise * size)))
        return out

    def matmul(self, x: int, size: int) -> int:
        """A product or convolution; backward reads its input."""
        heavy = self.random.choice((5e-10, 5e-10, 2e-9))
        out = self.op("matmul", (x,), size, heavy, rise=self.random.choice((1.0, 1.0, 2.0)))
        self.offer_codecs(x)
        self.record((len(self.forward) - 1, (x,), (x,), self.random.randint(MIB // 16, MIB)))
        return out

    def norm(self, x: int) -> int:
        """A normalisation; backward reads its input and statistics."""
        size = self.tensors[x].size_bytes
        out = self.op("norm", (x,), size, 6e-11)
        stats = self.tensor(max(size // 256, 8))
        op = self.forward.pop()
        self.forward.append(Op(op.name, (x,), (out, stats), op.seconds, size + self.tensors[stats].size_bytes))
        self.offer_codecs(x)
        self.record((len(self.forward) - 1, (x,), (x, stats), 1024))
        return out

    def act(self, x: int) -> int:
        """An activation: half of them read their input in backward, half a mask of their output."""
        size = self.tensors[x].size_bytes
        out = self.op("act", (x,), size, 3e-11)
        own = len(self.forward) - 1
        if self.random.random() < 0.5:
            self.offer_codecs(x)
            self.record((own, (x,), (x,), 0))
            return out
        mask = self.op("keep_mask", (out,), max(size // 4, 1), 4e-11)
        packed = CodecOption("bitpack", max(size // 32, 1), 5e-5 + 1e-11 * size, 1e-5, max(size // 32, 1), 0, True)
        self.tensors[mask] = Tensor(self.tensors[mask].name, self.tensors[mask].size_bytes, (packed,))
        self.record((own, (x,), (mask,), 0))
        return out

    def join(self, inputs: tuple[int, ...], size: int) -> int:
        """A sum or concatenation; backward reads no forward tensor."""
        out = self.op("join", inputs, size, 4e-11)
        self.record((len(self.forward) - 1, inputs, (), 0))
        return out

    def problem(self, last: int) -> Problem:
        """The step that ends in ``last``'s loss."""
        loss = self.op("loss", (last,), 4, 0.0)
        grad = {last: self._back("loss", (), last, 1e-5)}
        for index, inputs, reads, parameter_bytes in reversed(self.tape):
            self._mirror(index, inputs, reads, parameter_bytes, grad)
        resident = 2 * sum(self.tensors[t].size_bytes for t in self.gradients)
        parts = tuple(self.tensors), tuple(self.forward), tuple(self.backward)
        problem = Problem(*parts, (loss,), (), tuple(self.gradients), resident_bytes=resident, tangent_bytes=4)
        check_problem(problem)
        return problem

    def _back(self, name: str, reads: tuple[int, ...], like: int, seconds: float, fusion: Fusion | None = None) -> int:
        size = self.tensors[like].size_bytes
        out = self.tensor(size)
        op = Op(f"{name}_back.{len(self.backward)}", reads, (out,), seconds, size, fusion=fusion)
        self.backward.append(op)
        return out

    def _has_mask(self, index: int, reads: tuple[int, ...]) -> bool:
        following = self.forward[index + 1].outputs
        return bool(reads) and reads == following

    def _mirror(
        self, index: int, inputs: tuple[int, ...], reads: tuple[int, ...], parameter_bytes: int, grad: dict[int, int]
    ) -> None:
        op = self.forward[index]
        given = grad.get(op.outputs[0])
        if given is None:  # nothing downstream: a dead branch has no gradient
            return
        fusion = Fusion(index + 1, self.tensors[inputs[0]].size_bytes) if self._has_mask(index, reads) else None
        if parameter_bytes:
            made = self.tensor(parameter_bytes)
            self.gradients.append(made)
            weight_name = f"weight_back.{len(self.backward)}"
            self.backward.append(Op(weight_name, (given, *reads), (made,), op.seconds, parameter_bytes))
        name = op.name.split(".")[0]
        for t in inputs:
            new = given if name == "join" else self._back(name, (given, *reads), t, op.seconds, fusion)
            if t in grad:
                new = self._back("add", (grad[t], new), t, 4e-11 * self.tensors[t].size_bytes)
            grad[t] = new


def chain(n_ops: int, seed: int = 0) -> Problem:
    """Product, normalisation, activation, and again."""
    model = _Model(seed)
    x = model.op("embed", (), 4 * MIB, 1e-10)
    while model.n_ops < n_ops:
        x = model.act(model.norm(model.matmul(x, model.random.randint(MIB, 8 * MIB))))
    return model.problem(x)


def unet(n_ops: int, seed: int = 0) -> Problem:
    """Five levels down, half the size each, and up again with a skip connection per level."""
    model, levels = _Model(seed), 5
    per_level = max(round(n_ops / (7.5 * (2 * levels - 1))), 1)

    def block(x: int, size: int) -> int:
        for _ in range(per_level):
            x = model.act(model.norm(model.matmul(x, size)))
        return x

    x = model.op("embed", (), 16 * MIB, 1e-10)
    skips: list[int] = []
    for level in range(levels):
        x = block(x, 16 * MIB >> level)
        skips.append(x)
    for level in reversed(range(levels - 1)):
        size = 16 * MIB >> level
        x = block(model.join((model.matmul(x, size), skips[level]), 2 * size), size)
    return model.problem(x)


def dense_residual(n_ops: int, seed: int = 0) -> Problem:
    """Blocks that each read the sum of up to three earlier blocks."""
    model = _Model(seed)
    made = [model.op("embed", (), 4 * MIB, 1e-10)]
    while model.n_ops < n_ops:
        earlier = model.random.sample(made[-6:-1], min(len(made) - 1, model.random.randint(0, 2)))
        x = model.join((made[-1], *sorted(earlier)), 4 * MIB) if earlier else made[-1]
        y = model.act(model.matmul(model.norm(x), 16 * MIB))
        made.append(model.join((x, model.matmul(y, 4 * MIB)), 4 * MIB))
    return model.problem(made[-1])


def random_layered(n_ops: int, seed: int = 0, width: int = 6) -> Problem:
    """Random ops that read one or two of the last results; nothing is left unread."""
    model = _Model(seed)
    unread = [model.op("embed", (), 4 * MIB, 1e-10)]
    recent = list(unread)
    while model.n_ops < n_ops:
        x = unread.pop(0) if len(unread) >= width else model.random.choice(recent)
        kind = model.random.random()
        if kind < 0.4:
            out = model.matmul(x, model.random.randint(MIB // 2, 8 * MIB))
        elif kind < 0.8:
            out = (model.norm if kind < 0.6 else model.act)(x)
        else:
            inputs = tuple(dict.fromkeys((x, model.random.choice(recent))))
            unread = [t for t in unread if t not in inputs]
            out = model.join(inputs, model.tensors[x].size_bytes)
        unread = [t for t in unread if t != x] + [out]
        recent = [*recent, out][-2 * width :]
    return model.problem(model.join(tuple(unread), 4 * MIB))


SYNTHETIC: dict[str, Callable[[int, int], Problem]] = {
    "chain": chain,
    "unet": unet,
    "dense residual": dense_residual,
    "random layered": random_layered,
}
