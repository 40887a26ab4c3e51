"""One element of the sigmoid losses in Triton: where it lies, what is read for it, its loss and derivative. Float64 inside.

Formulas and layouts: README.md beside this file.
"""
import triton
import triton.language as tl

from rsloss_kernels.losses.focal.op import Modulator
from rsloss_kernels.losses.triton_common import exp_of_minus, log1p_of_fraction, reciprocal

FOCAL = tl.constexpr(int(Modulator.FOCAL))
QUALITY = tl.constexpr(int(Modulator.QUALITY))
VARIFOCAL = tl.constexpr(int(Modulator.VARIFOCAL))


@triton.jit
def product(x, y):
    """x * y, where a factor 0 makes it 0 whatever the other is."""
    return tl.where((x == 0) | (y == 0), 0.0, x * y)


@triton.jit
def loss_and_slope(logit, target, gamma, of_positives, of_negatives, MODULATOR: tl.constexpr, IS_HARD: tl.constexpr):
    """Loss of an element, its derivative by the logit, and whether the class weights drop it. `IS_HARD`: targets are 0 or 1."""
    is_one = target == 1
    small = exp_of_minus(tl.abs(logit))
    inverse = reciprocal(1.0 + small)
    log_term = log1p_of_fraction(small)
    small *= inverse
    # x, sigma(x), 1 - sigma(x), softplus(x) and softplus(-x) of the form that targets 0 and 1 share.
    x = tl.where(is_one, -logit, logit)
    probability = tl.where(x > 0, inverse, small)
    complement = tl.where(x > 0, small, inverse)
    cross_entropy = tl.where(x > 0, x, 0.0) + log_term
    exponent = tl.where(x > 0, 0.0, -x) + log_term
    weight = tl.where(is_one, of_positives, of_negatives)
    is_dropped = weight == 0
    if MODULATOR >= VARIFOCAL:
        gamma = tl.where(target > 0, 0.0, gamma)
    if IS_HARD:
        modulator = exp_of_minus(product(gamma, exponent))
        slope = gamma * product(complement, cross_entropy) + probability
    else:
        is_soft = (target != 0) & (target != 1)
        probability_of_one = tl.where(is_one, complement, probability)
        probability_of_zero = tl.where(is_one, probability, complement)
        is_up = logit > 0
        soft_entropy = product(tl.where(is_up, 1.0 - target, target), tl.abs(logit)) + log_term
        # From 1 - t where that is small, like 1 - sigma(z).
        difference = tl.where(is_up, (1.0 - target) - probability_of_zero, probability_of_one - target)
        spread = probability_of_one * probability_of_zero
        if MODULATOR == FOCAL:
            base = probability_of_one * (1.0 - target) + probability_of_zero * target
            base_slope = spread * (1.0 - 2.0 * target)
            soft_weight = of_positives * target + of_negatives * (1.0 - target)
        elif MODULATOR == QUALITY:
            base = tl.abs(difference)
            base_slope = tl.where(difference > 0, spread, -spread)
            soft_weight = tl.where(target > 0, of_positives, of_negatives)
        else:
            # Its gamma is 0: any base will do.
            base = target * 0.0 + 1.0
            base_slope = base
            soft_weight = of_positives * target if MODULATOR == VARIFOCAL else of_positives
        has_base = base > 0
        sound_base = tl.where(has_base, base, 1.0)
        soft_exponent = tl.where(has_base, -tl.log(sound_base), float("inf"))
        modulator = exp_of_minus(product(gamma, tl.where(is_soft, soft_exponent, exponent)))
        of_base = tl.where(has_base, base_slope / sound_base, 0.0)
        slope = gamma * product(complement, cross_entropy) + probability
        slope = tl.where(is_soft, product(gamma * of_base, soft_entropy) + difference, slope)
        cross_entropy = tl.where(is_soft, soft_entropy, cross_entropy)
        weight = tl.where(is_soft, soft_weight, weight)
        is_dropped = tl.where(is_soft, (of_positives == 0) & (of_negatives == 0), is_dropped)
    modulator = product(weight, modulator)
    slope = product(modulator, slope)
    return product(modulator, cross_entropy), tl.where(is_one, -slope, slope), is_dropped


@triton.jit
def weighted_loss_and_slope(
    level,  # pointers to logits, targets, qualities, weights and the class table
    place,
    row,
    column,
    inside,
    classes,
    ignore_index,
    MODULATOR: tl.constexpr,
    IS_INDEX: tl.constexpr,
    BACKGROUND_FIRST: tl.constexpr,
    WEIGHT_PER_ROW: tl.constexpr,
):
    """`v L`, its derivative by the logit, whether an element is used, and whether it is a positive; 0 of what is not used.

    Rows and columns are within the level even where `inside` is not, and may have a dimension of size 1.
    """
    logits_ptr, targets_ptr, qualities_ptr, weights_ptr, class_table_ptr = level
    logit = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float64)
    gamma = tl.load(class_table_ptr + column)
    of_positives = tl.load(class_table_ptr + classes + column)
    of_negatives = tl.load(class_table_ptr + 2 * classes + column)
    if IS_INDEX:
        label = tl.load(targets_ptr + row)
        is_positive = label == column + (1 if BACKGROUND_FIRST else 0)
        target = is_positive.to(tl.float64)
        if qualities_ptr is not None:
            target = tl.where(is_positive, tl.load(qualities_ptr + row).to(tl.float64), 0.0)
        is_used = inside & (label >= 0) & (label != ignore_index) & ~(target < 0)
    else:
        target = tl.load(targets_ptr + place, mask=inside, other=-1.0).to(tl.float64)
        is_positive = target > 0
        is_used = inside & ~(target < 0)
    loss, slope, is_dropped = loss_and_slope(
        *(logit, target, gamma, of_positives, of_negatives), MODULATOR, IS_INDEX and qualities_ptr is None
    )
    is_used = is_used & ~is_dropped
    is_nan = (logit != logit) | (target != target)
    if weights_ptr is not None:
        if WEIGHT_PER_ROW:
            weight = tl.load(weights_ptr + row).to(tl.float64)
        else:
            weight = tl.load(weights_ptr + place, mask=inside, other=0.0).to(tl.float64)
        is_used = is_used & (weight != 0)
        is_nan = is_nan | (weight != weight)
        loss *= weight
        slope *= weight
    loss = tl.where(is_used, tl.where(is_nan, float("nan"), loss), 0.0)
    slope = tl.where(is_used, tl.where(is_nan, float("nan"), slope), 0.0)
    return loss, slope, is_used, is_positive
