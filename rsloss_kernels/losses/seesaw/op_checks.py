"""Checks of the arguments of the Seesaw operators, for the backends written in Python; a compiled one checks the same in C++."""
import torch

from rsloss_kernels import _checks


def _check_rows(op: str, logits, labels, weights, log_counts) -> None:
    if logits.dtype not in _checks.LOGIT_TYPES:
        raise TypeError(f"{op}: logits must be float16, bfloat16, float32 or float64, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] < 3:
        raise ValueError(f"{op}: logits must have shape [N, C + 2] with C at least 1, got {list(logits.shape)}")
    rows, columns = logits.shape
    _checks.check_table(op, "logits", logits, logits, (rows, columns), *_checks.LOGIT_TYPES)
    _checks.check_table(op, "labels", labels, logits, (rows,), torch.int32, torch.int64)
    if weights is not None:
        _checks.check_table(op, "weights", weights, logits, (rows,), *_checks.LOGIT_TYPES)
    _checks.check_table(op, "log_counts", log_counts, logits, (columns - 2,), torch.float64)


def _check_numbers(op: str, **numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{op}: {name} must be finite and at least 0, got {value}")


def seesaw_forward(logits, labels, weights, log_counts, p, q, eps, reduction, avg_factor) -> None:
    op = "seesaw_forward"
    _check_rows(op, logits, labels, weights, log_counts)
    _check_numbers(op, p=p, q=q, eps=eps)
    if not 0 <= reduction <= 2:
        raise ValueError(f"{op}: reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")
    if avg_factor is not None:
        _checks.check_table(op, "avg_factor", avg_factor, logits, (), torch.float64)


def seesaw_backward(logits, labels, weights, log_counts, divisors, row_tables, grad_objectness, grad_classes, p, q) -> None:
    op = "seesaw_backward"
    _check_rows(op, logits, labels, weights, log_counts)
    _check_numbers(op, p=p, q=q)
    _checks.check_table(op, "divisors", divisors, logits, (2,), torch.float64)
    _checks.check_table(op, "row_tables", row_tables, logits, (4, logits.shape[0]), torch.float64)
    for name, grad in (("grad_objectness", grad_objectness), ("grad_classes", grad_classes)):
        if grad is not None:
            shape = () if grad.dim() == 0 else (logits.shape[0],)
            _checks.check_table(op, name, grad, logits, shape, *_checks.LOGIT_TYPES)
