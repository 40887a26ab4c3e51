"""Defines the operators of the library, all in one way.

Every operator `name` has one overload per backend, `rsloss_kernels::name.reference`, `.cpp`, `.cuda` and `.triton`, all with
one schema, one fake implementation and one autograd formula. The public function picks the overload once; backward calls the
overload of the same backend. Schemas are defined here in Python, so that the operators exist when nothing was compiled; the
compiled libraries only add kernels to the overloads `.cpp` and `.cuda`, which the dispatcher then calls directly.
"""
import functools
import importlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch

NAMESPACE = "rsloss_kernels"
BACKENDS = ("reference", "cpp", "cuda", "triton")
defined: list[str] = []
_PYTHON_MODULES = {"reference": "reference", "triton": "triton_impl"}


def define(
    stem: str,
    name: str,
    schema: str,
    fake: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
    make_backward: Callable[[str], Callable[..., Any]] | None = None,
    num_tables: int = 0,
    num_saved_tables: int = 0,
    compose: Callable[[str], Callable[..., Any]] | None = None,
    backends: tuple[str, ...] = BACKENDS,
) -> None:
    """Defines `name` for every backend. Those that are not among `backends` have no kernel of it by design, and refuse it.

    Its last `num_tables` outputs are for its own backward only; the last `num_saved_tables` of the tensors that it saves are
    not the caller's.

    The Python backends are looked up on the first call as the function `name` of `losses/<stem>/reference.py` and
    `losses/<stem>/triton_impl.py`, so that importing the library imports neither. `make_backward(backend)` returns the
    autograd formula, which must call operators of that backend only. Before a Python backend runs, the function `name` of
    `losses/<stem>/op_checks.py` gets the same arguments and raises on bad ones; a compiled backend checks for itself. An operator
    that calls others has `compose(backend)` instead, its implementation for a Python backend. Tensors on
    different devices are refused by the fake implementation too: with a meta tensor among them the dispatcher calls that.
    """
    defined.append(name)
    _implemented_by[name] = backends
    for backend in BACKENDS:
        qualified = f"{NAMESPACE}::{name}.{backend}"
        torch.library.define(qualified, schema)
        torch.library.register_fake(qualified, _on_one_device(name, backend, _with_every_tensor(name, schema, fake)))
        if backend in _PYTHON_MODULES and backend in backends:
            implementation = _lazily(stem, backend, name) if compose is None else compose(backend)
            torch.library.impl(qualified, "default", _with_every_tensor(name, schema, implementation))
        if make_backward is not None:
            backward = make_backward(backend)
            torch.library.register_autograd(qualified, backward, setup_context=setup_context)
            _num_tables[name] = num_tables
            function = _eager_function(operator(name, backend), setup_context, backward, num_tables, num_saved_tables)
            # The one in C++, without the one in Python around it, which refuses functorch's transforms: `_backends.resolve` has done so.
            _functions[name, backend] = super(torch.autograd.Function, function).apply


_implemented_by: dict[str, tuple[str, ...]] = {}


def implemented_by(name: str) -> tuple[str, ...]:
    """The backends that implement the operator `name` where they can run at all."""
    return _implemented_by[name]


def without_derivative(reason: str) -> tuple[Callable[..., Any], Callable[[str], Callable[..., Any]]]:
    """`setup_context` and `make_backward` of an operator that is itself a gradient: a second one is refused."""

    def make_backward(backend):
        def backward(ctx, *grads):
            raise RuntimeError(f"rsloss_kernels: {reason}; call backward without create_graph=True")

        return backward

    return lambda ctx, inputs, output: None, make_backward


# The `apply` of an autograd function.
_functions: dict[tuple[str, str], Callable[..., Any]] = {}
_num_tables: dict[str, int] = {}


def differentiable(
    name: str, backend: str, logits: torch.Tensor | list[torch.Tensor], *args
) -> tuple[torch.Tensor, ...]:
    """Calls the operator `name`, whose first argument are the logits, one tensor or a list as in its schema, the only ones with a
    gradient; returns its outputs without the tables of its backward.

    Outside of tracing this takes a plain autograd function with the operator's own formula: the wrapper that PyTorch puts around a
    formula with tensor lists costs more than a small loss.
    """
    if torch.compiler.is_compiling():
        outputs = operator(name, backend)(logits, *args)
        return outputs[: len(outputs) - _num_tables[name]]
    apply = _functions[name, backend]
    return apply(args, logits) if isinstance(logits, torch.Tensor) else apply(args, *logits)


def operator(name: str, backend: str) -> torch._ops.OpOverload:
    """The overload of the operator `name` for `backend`."""
    return getattr(getattr(torch.ops.rsloss_kernels, name), backend)


def has_gradient(name: str) -> bool:
    return name in _num_tables


def refuse_transformed(name: str, *tensors: torch.Tensor | None) -> None:
    """Raises if a transform that knows no rule for the operator sees one of `tensors`: grad, vmap, jvp; functionalize needs none."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        kinds = torch._C._functorch.is_batchedtensor, torch._C._functorch.is_gradtrackingtensor
        if any(is_of_kind(tensor) for tensor in tensors if tensor is not None for is_of_kind in kinds):
            refuse_transform(name)


def refuse_transform(name: str) -> NoReturn:
    raise RuntimeError(
        f"rsloss_kernels: {name} cannot run under a transform of torch.func (grad, vmap, jvp, functionalize, ...), which knows "
        "no rule for its kernels. For gradients call the loss and torch.autograd.grad outside of the transform; in place of vmap "
        "give the batch as one tensor (ranking losses: with segments), or call the loss, and the gradient in place of "
        "is_grads_batched or vectorize, for each part of it"
    )


def has_native_kernel(name: str, backend: str, device_type: str) -> bool:
    """Whether a loaded library brought a kernel of `name.backend` for tensors on `device_type`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}.{backend}", key)


class _Context:
    """What the formula of an operator sees in place of autograd's own context, outside of tracing.

    Autograd keeps what it is given first, the caller's tensors, for its hooks (activation checkpointing) and its check of in-place
    edits. Tables that only this call knows stay here, which is cheaper. Holds nothing of autograd's context: a cycle would keep
    the logits alive.
    """

    non_differentiable: tuple[torch.Tensor, ...] = ()
    saved_tensors: tuple[torch.Tensor | None, ...] = ()

    def __init__(self, state: dict[str, object] | None = None):
        if state is not None:
            self.__dict__ = state

    def mark_non_differentiable(self, *outputs: torch.Tensor) -> None:
        self.non_differentiable = outputs

    def set_materialize_grads(self, value: bool) -> None:
        pass  # never done, which is what every formula wants

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        self.saved_tensors = tensors

    def with_tensors_of_caller(self, tensors: tuple[torch.Tensor | None, ...]) -> "_Context":
        """Another one, whole, for one call of the formula. Not by `copy`, which costs several times as much."""
        return _Context({**self.__dict__, "saved_tensors": (*tensors, *self.saved_tensors)})


# Whether the backward that is running was called with retain_graph=True. Without the answer tables live as long as the loss.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _eager_function(
    overload: Callable[..., Any], setup_context: Callable[..., Any], formula: Callable[..., Any], num_tables: int, num_saved_tables: int
) -> type[torch.autograd.Function]:
    takes_list = isinstance(overload._schema.arguments[0].type, torch.ListType)
    missing = (None,) * num_tables
    below_autograd, is_grad_enabled = torch._C._AutoDispatchBelowAutograd, torch.is_grad_enabled
    are_transforms_active = torch._C._are_functorch_transforms_active
    is_legacy_batched = torch._C._functorch.is_legacy_batchedtensor

    # forward with ctx rather than a separate setup_context: torch binds the arguments of the latter by inspection on every call.
    def forward(ctx, args, *levels):
        logits = levels if takes_list else levels[0]
        with below_autograd():
            output = overload(logits, *args)
        context = _Context()
        setup_context(context, (logits, *args), output)
        saved = context.saved_tensors
        of_caller = len(saved) - num_saved_tables
        ctx.save_for_backward(*saved[:of_caller])
        context.saved_tensors = saved[of_caller:]
        ctx.context = context
        ctx.set_materialize_grads(False)
        non_differentiable = context.non_differentiable
        if len(non_differentiable) > num_tables:
            ctx.mark_non_differentiable(*non_differentiable[: len(non_differentiable) - num_tables])
        return tuple(output[: len(output) - num_tables])

    def backward(ctx, *grads):
        if are_transforms_active():
            refuse_transformed(backward_operator, *grads)
        for grad in grads:
            # Of torch.autograd.grad(is_grads_batched=True) and jacobian(vectorize=True), which are no transform of torch.func.
            if grad is not None and is_legacy_batched(grad):
                refuse_transform(backward_operator)
        kept = ctx.context
        # Hooks that unpack tensors run here, where they see autograd.
        context = kept.with_tensors_of_caller(ctx.saved_tensors)
        # With create_graph=True the operators inside must see autograd, to refuse a second derivative.
        if is_grad_enabled():
            grad_logits = formula(context, *grads, *missing)[0]
        else:
            with below_autograd():
                grad_logits = formula(context, *grads, *missing)[0]
        if not _keeps_graph():
            kept.saved_tensors = ()
        return (None, *grad_logits) if takes_list else (None, grad_logits)

    def jvp(ctx, *tangents):
        raise RuntimeError(
            f"rsloss_kernels: {loss} has no forward-mode derivative (torch.autograd.forward_ad): its gradient is a formula of its own; "
            "call backward or torch.autograd.grad"
        )

    # Named when it is made, after the loss and the backend: torch makes the name of `grad_fn` from it then.
    operator_name, _, backend = overload.name().removeprefix(f"{NAMESPACE}::").partition(".")
    loss = operator_name.rpartition("_")[0]
    backward_operator = f"{loss}_backward"
    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward), "jvp": staticmethod(jvp)}
    return type(torch.autograd.Function)(f"{loss}_{backend}", (torch.autograd.Function,), functions)


def _on_one_device(name: str, backend: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fake)
    def checked(*args):
        first = device = None
        for argument, value in zip(operator(name, backend)._schema.arguments, args, strict=True):
            for tensor in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(tensor, torch.Tensor):
                    if device is None:
                        first, device = argument.name, tensor.device
                    if tensor.device != device:
                        raise ValueError(f"{name}: {argument.name} must be on the device of {first}, {device}, got {tensor.device}")
        return fake(*args)

    return checked


def _with_every_tensor(name: str, schema: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The dispatcher lets None pass for a tensor, whatever the schema says."""
    arguments = enumerate(torch._C.parse_schema(f"{name}{schema}").arguments)
    wanted = [(place, argument.name) for place, argument in arguments if isinstance(argument.type, torch.TensorType)]

    @functools.wraps(implementation)
    def checked(*args):
        for place, argument in wanted:
            if args[place] is None:
                raise TypeError(f"{name}: {argument} must be a Tensor, got None")
        return implementation(*args)

    return checked


def _lazily(stem: str, backend: str, name: str) -> Callable[..., Any]:
    folder = f"rsloss_kernels.losses.{stem}"

    def implementation(*args):
        getattr(importlib.import_module(f"{folder}.op_checks"), name)(*args)
        return getattr(importlib.import_module(f"{folder}.{_PYTHON_MODULES[backend]}"), name)(*args)

    implementation.__name__ = f"{name}_{backend}"
    return implementation
