"""PyTorch: a whole step of pictures on the device as one program of Inductor, the compiler behind `torch.compile`.

The engine's own step is run once under a recorder of tensor operations, with every variable of the model and of the
optimizer as an argument, and what was recorded is compiled: making the images, both ways through the network, the
running statistics and the update. Keras's Python is then out of the way, so nothing of it must be understood by a
tracer of Python. On a GPU the program is recorded as a CUDA graph and replayed, as the engine does with its own step.
"""

import torch
from keras import StatelessScope
from torch._inductor import compile as compile_graph
from torch.fx.experimental.proxy_tensor import make_fx

from kvision.engine import torch as eager


def compile_steps(engine) -> None:
    """Let `engine.train_steps` take compiled steps.

    The first call compiles for the shape of its params, in 20 s to a minute; another shape of them is compiled anew.
    Variables are as exact as before, but operations that Inductor joins keep float32 between them, where one by one
    they round to what the layers compute in.

    Args:
        engine: of this backend, with an optimizer, gradients not accumulated.
    """
    engine.train_steps = _CompiledSteps(engine)


class _CompiledSteps:
    def __init__(self, engine):
        self.engine, self.pictures, self.recording = engine, None, None

    def __call__(self, pictures, params):
        params = torch.as_tensor(params, device=pictures.tensors[0].device)
        if self.pictures is not pictures:
            self.pictures, self.step = pictures, _Program(self.engine, pictures)
            if eager.accelerated():
                self.recording = eager._Recording(None, pictures)
                self.recording.run = self.step
        step = self.recording.step if self.recording else self.step
        results = [step(draw) for draw in params]
        return [torch.stack(values) for values in zip(*results, strict=True)]


class _Recordable(eager._Filled):
    """Within this nothing is copied from the host, as in a CUDA graph, and one-hot vectors are made without a look at
    the labels, which a recording of operations cannot take."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.one_hot:
            labels, classes = args
            return (labels[..., None] == torch.arange(classes, device=labels.device)).long()
        return super().__torch_function__(function, types, args, kwargs)


class _Program:
    """One step: `program(draw)` gives its loss and its correct answers, and leaves the variables after it."""

    def __init__(self, engine, pictures):
        self.engine, self.pictures = engine, pictures
        model, optimizer = engine.model, engine.optimizer
        self.trained = model.trainable_variables
        self.variables = [*self.trained, *model.non_trainable_variables, *optimizer.variables]
        self.tensors = [variable._value.detach() for variable in self.variables]
        self.compiled = {}

    def __call__(self, draw):
        arguments = [*self.tensors, *self.pictures.tensors, draw]
        if draw.shape not in self.compiled:
            before = [tensor.clone() for tensor in self.tensors]
            with _Recordable():
                recorded = make_fx(self._step)(*arguments)
            torch._foreach_copy_(self.tensors, before)  # recording took a step
            self.compiled[draw.shape] = compile_graph(recorded, arguments)
        with torch.no_grad():
            return list(self.compiled[draw.shape](*arguments))

    def _step(self, *arguments):
        engine, count = self.engine, len(self.variables)
        tensors, (*pictures, draw) = arguments[:count], arguments[count:]
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[: len(self.trained)]]
        values = [*leaves, *tensors[len(leaves) :]]
        with StatelessScope(state_mapping=list(zip(self.variables, values, strict=True))) as scope:
            with torch.enable_grad():
                loss, correct, gradients = engine._differentiate(*self.pictures.make_batch(tuple(pictures), draw))
            with torch.no_grad():
                getattr(engine, "_fast_optimizer", engine.optimizer).apply(gradients, self.trained)
        with torch.no_grad():
            for variable, tensor in zip(self.variables, tensors, strict=True):
                tensor.copy_(scope.get_current_value(variable))
        return loss, correct
