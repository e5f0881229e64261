"""The faults, one function each: what it takes to be named, and what is to be done.

A function sees all log lines up to now and answers with what it saw and the remedy, or with None. Losses are in nats a
token, noise is the standard deviation around the trend, and every limit is a share of the curve's own level or noise,
so that a steady curve is judged by little and a wild one by much.
"""

import math
from collections.abc import Callable

import numpy as np

from gazelle.train.advice.curves import MEDIAN_ERROR, Curves, Floats, halves, noise, smooth
from gazelle.train.advice.findings import Facts, Kind

Said = tuple[str, str] | None

# Divergence: RISEN lines in a row, each this far above the best level. Loss humps at the end of warm-up are shorter or
# lower; four times the noise five times in a row does not come by chance.
RISEN, RISE, RISE_NATS, RISE_NOISE = 5, 0.25, 0.3, 4.0
SETTLED = 5  # lines there have to be to rise above
RISE_ORDERED = 1.0  # rows that get harder on purpose may well double the loss
# Spike: a line so far above the LOOK before it, and back within BACK lines. As in `train/spikes.py` a loss has to be
# three times what it was, and a nat more; in a line that is a mean over four steps or more that is diluted to half as
# much again. Seven standard deviations of the logarithm: none of a run's thousands of lines is to be one by chance.
# Of 64 lines noise is now and then measured at half of what it is, of 256 at three quarters.
LOOK, RECENT, WARM, BACK, SPIKE_LOSS, SPIKE_NATS, SPIKE_NORM, SPIKE_NOISE = 256, 16, 8, RISEN - 1, 3.0, 1.0, 10.0, 7.0
DILUTED = 4
CLIP = 0.3  # as QLoRA clips (arXiv 2305.14314)
# Overfitting: the same rows are evaluated each time, so little is noise. Two evaluations in a row above the best, or
# one far above it; a typical third epoch loses a percent or two and is none.
OVER, OVER_AT_ONCE, OVER_NOISE = 0.03, 0.10, 4.0
# Too little data: OpenAI's guide sees clear gains from 50 to 100 rows on, Unsloth's asks for 100, better 1,000. Or
# training loss is half of the held-out loss, and the epochs after the first gained nothing held out.
FEW_ROWS, FEW_TOKENS, ENOUGH_ROWS, GAP, GAINED = 50, 5_000, 10_000, 0.5, 0.02
# Loss near zero: e^-0.02 is 98 % for every token, over rows that are still to be seen for a quarter of the run. Nor may
# held-out loss have gained as much since the evaluation before.
ZERO, TO_GO = 0.02, 0.25
# Plateau: never moved (first line to now, a third of the run) or moves no more. Where the learning rate is low by
# schedule a flat curve is as it should be; below a fifth of where it began it has arrived.
UNMOVED, FLAT, FLAT_ERROR, HELD_FLAT, RATE, LONG, ARRIVED, LEAST_LINES = 0.04, 0.015, 0.01, 0.003, 0.5, 0.4, 0.2, 24
# Underfitting: between the halves of the last third a straight line falls by 17 % of its whole fall, a curve that has
# settled (three time constants) by 4 %.
STILL_FALLING, SURE, LEAST_GAIN = 0.10, 3.0, 0.005


def divergence(curves: Curves, facts: Facts) -> Said:
    """The loss is no number twice in a row, or rose and stays up."""
    losses = curves["loss"]
    rate = curves.peak_rate
    remedy = (f"set learning_rate to {short(rate / 3)} (a third)" if rate > 0 else "set learning_rate to a third"
              ) + ", warm up for 5 % of the steps (warmup_steps=0.05), and start from the last checkpoint before this"
    if len(losses) > 1 and not np.isfinite(losses[-2:]).any():
        return "the loss is no number any more", remedy
    _, losses = curves.finite()
    before, recent = losses[:-RISEN], losses[-RISEN:]
    if len(before) < SETTLED:
        return None
    level = float(smooth(before, max(5, len(before) // 20)).min())  # the more lines, the lower the luckiest few
    rise = level * (RISE_ORDERED if facts.ordered else RISE)
    limit = level + max(rise, RISE_NATS, RISE_NOISE * noise(losses[-50:]))
    if not (recent > limit).all():
        return None
    began = curves.finite()[0][-RISEN]
    for steps, evals, _ in curves.evals().values():
        if steps[-1] >= began and evals[-1] <= evals.min() * (1 + RISE / 2):
            return None  # what is held out is predicted as before: the rows changed, not the model
    return f"the loss rose from {level:.3g} to {np.median(recent):.3g} and stays there", remedy


def spike(curves: Curves, facts: Facts) -> Said:
    """The loss or the gradient norm jumped for a few lines and came back."""
    steps, rate = curves["step"], curves.peak_rate
    lower = f"learning_rate to {short(rate / 2)}" if rate > 0 else "learning_rate to a half"
    clipped = facts.max_grad_norm or math.inf
    mean_over = min(DILUTED, max(1.0, float(np.median(np.diff(steps))))) if len(steps) > 1 else 1
    for name, times in (("loss", 1 + (SPIKE_LOSS - 1) / mean_over), ("grad_norm", SPIKE_NORM)):
        values = curves[name]
        for at in range(max(WARM, len(values) - BACK - 2), len(values) - 2):
            before = values[max(0, at - LOOK):at]
            before = before[np.isfinite(before)]
            if name == "grad_norm" and not np.isfinite(values[at]):
                continue  # not logged; where it is no number, neither is the loss
            if len(before) < WARM:
                continue
            middle, limit = robust_limit(before, times)
            limit = max(limit, middle + SPIKE_NATS / mean_over if name == "loss" else facts.max_grad_norm)
            jumped = not np.isfinite(values[at]) or values[at] > limit
            if jumped and (values[-2:] < math.sqrt(middle * limit)).all():
                what, clip = ("loss", CLIP) if name == "loss" else ("gradient norm", middle)
                tighter = f"max_grad_norm to {short(clip)}, or " if clip < clipped else ""
                seen = f"the {what} jumped from {middle:.3g} to {values[at]:.3g} at step {steps[at]:.0f} and came back"
                return seen, (f"look at the rows of that step, and set {tighter}{lower}; "
                              'on_spike="rollback" undoes such steps')
    return None


def overfitting(curves: Curves, facts: Facts) -> Said:
    """Held-out loss rises while training loss falls on."""
    for name, (steps, evals, epochs) in curves.evals().items():
        curve = smooth(evals) if len(evals) >= 8 else evals
        best = int(curve.argmin())
        if best == len(curve) - 1:
            continue
        least = float(curve[best])
        wild = OVER_NOISE * noise(evals) if len(evals) >= 8 else 0.0
        after = curve[best + 1:]
        if not (after[-1] > least + max(OVER_AT_ONCE * least, wild)
                or (len(after) > 1 and (after[-2:] > least + max(OVER * least, wild)).all())):
            continue
        at = best + (1 if len(evals) >= 8 else 0)  # the middle one of three
        when, losses = curves.finite()
        if not len(losses):
            continue
        then, now = (float(np.median(part)) for part in (losses[:max(1, (when <= steps[at]).sum())][-5:], losses[-5:]))
        if now > 1.02 * then:
            continue  # training is no better off: that is no overfitting
        set_name = name.removeprefix("eval_").removesuffix("loss").strip("_")
        which = f" on {set_name}" if set_name else ""
        remedy = ("keep the best checkpoint (load_best_model_at_end=True, metric_for_best_model=\"eval_loss\", "
                  f"save_strategy as eval_strategy), {fewer(epochs[at], facts)}, or set lora_dropout to 0.05")
        seen = (f"held-out loss{which} was {least:.3g} at step {steps[at]:.0f} and is {evals[-1]:.3g} now, while "
                f"training loss went from {then:.3g} to {now:.3g}")
        return seen, remedy
    return None


def too_little_data(curves: Curves, facts: Facts) -> Said:
    """There are hardly any rows, or epochs after the first only learn rows by heart."""
    rows, tokens = facts.examples, facts.labelled_tokens
    if rows is not None and rows < FEW_ROWS and (tokens is None or tokens < FEW_TOKENS) and len(curves):
        seen = f"there are {rows} rows" + (f" with {tokens:,} tokens to learn" if tokens is not None else "")
        return seen, f"collect at least {2 * FEW_ROWS} rows, better 1,000; until then it learns these rows by heart"
    _, losses = curves.finite()
    if (rows is not None and rows > ENOUGH_ROWS) or len(losses) < 5:
        return None
    now = float(np.median(losses[-5:]))
    for _, evals, epochs in curves.evals().values():
        first = evals[(epochs >= 0.9) & (epochs < 1.9)]
        later = evals[epochs >= 1.9]
        if not len(first) or not len(later) or now >= GAP * evals[-1]:
            continue
        if later.min() > (1 - GAINED) * first.min() and evals[-1] <= (1 + OVER) * evals.min():
            seen = (f"training loss is {now:.3g} and held-out loss {evals[-1]:.3g}, and the epochs after the first "
                    f"gained {max(0.0, 1 - later.min() / first.min()):.1%} held out: rows are learnt by heart")
            return seen, "add rows (twice as many, of other kinds), or set num_train_epochs to 1; a larger r is no help"
    return None


def loss_near_zero(curves: Curves, facts: Facts) -> Said:
    """Nothing is left to learn, long before the end."""
    steps, losses = curves.finite()
    if len(losses) < 5 or not facts.max_steps or curves.step > (1 - TO_GO) * facts.max_steps:
        return None
    now = float(np.median(losses[-5:]))
    held = [evals for _, evals, _ in curves.evals().values()]
    if now >= ZERO or any(map(still_gains, held)):
        return None
    epoch = curves["epoch"][-1]
    if epoch < 1:
        remedy = ("look at what is labelled (gazelle train RECIPE --dry-run shows the first row): an answer that is in "
                  "the prompt, or rows that are all alike, need no training")
    else:
        remedy = f"{fewer(epoch, facts)}, or add rows: those that are there are known"
    said = f"; held-out loss is {max(float(evals[-1]) for evals in held):.3g}" if held else ""
    seen = (f"training loss is {now:.2g} after {steps[-1]:.0f} of {facts.max_steps} steps, and the rest has nothing to "
            f"learn from{said}")
    return seen, remedy


def plateau(curves: Curves, facts: Facts) -> Said:
    """The loss never moved, or moves no more, though the learning rate is high."""
    steps, losses = curves.finite()
    total = facts.max_steps or curves.step
    rates = curves["learning_rate"][np.isfinite(curves["loss"])]
    high = np.isnan(rates) | (rates >= RATE * curves.peak_rate)
    if len(losses) < LEAST_LINES or not high[-1]:
        return None
    rate = curves.peak_rate
    first, last = max(5, len(losses) // 12), len(losses) // 3
    start, now = float(np.median(losses[:first])), float(np.median(losses[-last:]))
    farthest = max(abs(start - now), abs(start - float(np.median(losses))))  # from where it began
    if steps[-1] - steps[int(high.argmax())] >= total / 3:  # warm-up apart
        error = MEDIAN_ERROR * noise(losses) * math.sqrt(1 / first + 1 / last)
        moving = abs(start - now) > max(UNMOVED / 4 * start, 2 * error)
        if farthest + error < UNMOVED * start and not moving and not held_out_gains(curves, steps[0], UNMOVED):
            more = f"set learning_rate to {short(5 * rate)} (five times)" if rate > 0 else "raise learning_rate"
            seen = f"the loss was {start:.3g} at the beginning and is {now:.3g}: it has not moved"
            return seen, f"{more}, and look at what is labelled (gazelle train RECIPE --dry-run)"
    window = high & (steps >= steps[-1] - LONG * total)
    if steps[window][0] > steps[-1] - 0.95 * LONG * total or window.sum() < LEAST_LINES:
        return None
    level, fall, error = halves(losses[window])
    _, bend, _ = halves(np.roll(losses[window], window.sum() // 4))  # its outer half against its inner one
    if level < ARRIVED * start or error > FLAT_ERROR * level or max(abs(fall), abs(bend)) + error > FLAT * level:
        return None
    if held_out_gains(curves, steps[window][0], HELD_FLAT):
        return None
    decay = "" if facts.schedule in ("linear", "cosine") else 'lr_scheduler_type="cosine" takes it lower, or '
    remedy = (f"{decay}stop here (max_steps={steps[window][0]:.0f}); if answers are not good enough yet, double r, or "
              "improve the rows")
    return f"the loss has stayed at {level:.3g} since step {steps[window][0]:.0f}, though the learning rate is " + (
        f"{short(float(rates[-1]))}" if rates[-1] > 0 else "high"), remedy


def underfitting(curves: Curves, facts: Facts) -> Said:
    """The run is over and the loss was still on its way down."""
    steps, losses = curves.finite()
    if not curves.ended or len(losses) < 12 or (facts.max_steps and curves.step < 0.97 * facts.max_steps):
        return None
    edge = max(3, len(losses) // 20)
    whole = float(np.median(losses[:edge]) - np.median(losses[-edge:]))
    third = steps > steps[-1] * 2 / 3
    epoch = curves["epoch"][np.isfinite(curves["loss"])]
    boundary = np.floor(epoch[-1] - 1e-6)  # of the last epoch: rows seen again are known, which is no slope
    if np.isfinite(boundary) and (third & (epoch > boundary)).sum() >= 8:
        third &= epoch > boundary
    if third.sum() < 4:
        return None
    level, fall, error = halves(losses[third])
    # Noise of a dozen lines may be measured at half of what it is; that of all, as a share, is surer.
    sure = MEDIAN_ERROR * level * noise(np.log(np.maximum(losses, 1e-30))) * math.sqrt(4 / third.sum())
    for _, evals, _ in curves.evals().values():
        if len(evals) > 1 and evals[-1] > 0.99 * evals[:-1].min():
            return None
    if fall < max(SURE * max(error, sure), STILL_FALLING * whole, LEAST_GAIN * level) or whole <= 0:
        return None
    rate = curves.peak_rate
    epochs = facts.epochs or (float(epoch[-1]) if np.isfinite(epoch[-1]) else None)
    longer = f"set num_train_epochs to {max(2, math.ceil(2 * epochs))}" if epochs else "train twice as long"
    faster = f" or learning_rate to {short(2 * rate)} (twice)" if rate > 0 else ""
    seen = (f"the loss was still falling when the run ended: by {fall:.2g} within its last {third.sum()} log lines, of "
            f"{whole:.2g} in all")
    return seen, longer + faster


def still_gains(evals: Floats) -> bool:
    """Whether held-out loss fell from the evaluation before to the last one, or may have, as there is only one."""
    return bool(evals[-1] > ZERO and (len(evals) < 2 or evals[-2] - evals[-1] > ZERO))


def held_out_gains(curves: Curves, since: float, least: float) -> bool:
    """Whether any held-out loss fell by this share since a step."""
    for steps, evals, _ in curves.evals().values():
        before, after = evals[steps <= since], evals[steps > since]
        reference = before[-1] if len(before) else evals[0]
        if len(after) and after.min() < (1 - least) * reference:
            return True
    return False


def robust_limit(values: Floats, times: float) -> tuple[float, float]:
    """What values are of late, and what is far above it: so many times, or standard deviations of the logarithm."""
    logs = np.log(np.maximum(values, 1e-30))
    middle = float(np.median(logs[-RECENT:]))  # of the last ones: a curve that falls was higher before
    return math.exp(middle), math.exp(middle + max(math.log(times), SPIKE_NOISE * noise(logs)))


def fewer(epoch: float, facts: Facts) -> str:
    """The advice to stop where the epoch was."""
    if not math.isfinite(epoch):
        return "train for fewer steps"
    whole = max(1, math.ceil(epoch - 0.05))
    if facts.epochs is not None and whole >= facts.epochs:
        return "halve learning_rate"
    return f"set num_train_epochs to {whole}"


def short(value: float) -> str:
    """A learning rate with two digits."""
    return f"{value:.2g}" if value >= 0.01 else f"{value:.1e}".replace("e-0", "e-")


FAULTS: dict[Kind, Callable[[Curves, Facts], Said]] = {
    "divergence": divergence, "spike": spike, "overfitting": overfitting, "too little data": too_little_data,
    "loss near zero": loss_near_zero, "plateau": plateau, "underfitting": underfitting,
}
