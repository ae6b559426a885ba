"""Pseudo-labels: the merged model learns, without labels, from its own sure predictions on unlabelled samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamerge.backbones import Batch, Output
from adamerge.backbones.inputs import moved, stack
from adamerge.errors import ConfigError, DataError
from adamerge.objectives.base import Course, Objective, Predict, Samples
from adamerge.objectives.trust import UNTRUSTED, SurestOfAll, Trust
from adamerge.objectives.views import CropAndFlip, Unchanged, View, seeds_of, uniform

AT_ONCE = 256  # samples that are looked at together when the trusted ones are chosen
WEAK, STRONG, DRAWS = range(3)  # what random numbers are for


class PseudoLabel(Objective):
    """UFM: cross-entropy of a strong view to trusted classes for some samples, to softened predictions for the others.

    At each new pass over a task's N calibration samples the current model looks at all of them, as they are. For each class c
    the ``min(share * N / C, limit)`` samples of largest ``p_c`` are trusted to be of class c, for this pass.

    Of a batch, ``part`` of the samples are trusted ones, the others are not: what the order of the data brought too many of
    is replaced by draws from the other kind, as long as there are both. A trusted sample's target q is its class. Another's
    comes from the prediction p for its weak view, ``q = p^(1/T) / sum p^(1/T)``; it counts only if ``max q > omega``, with
    omega rising linearly from ``threshold`` in the first step towards 1. The loss is the mean of
    ``-sum_c q_c log p_c(strong view)`` over the samples that count.

    The defaults are the paper's. Its exponent is 1/2 (equation 16), T = 2: it calls that sharpening, and it flattens.
    T = 1/2, which squares and so sharpens, ``SurestOfPredicted`` and other views are choices of one's own. The released code
    does neither: its factor cancels, and it trusts every sample for ever, so that it descends the cross-entropy to the base's
    own predictions.

    Args:
        weak: view for the pseudo-labels; None for the samples as they are.
        strong: view that is learned from; None for the paper's crop and flip of images. Where mirror images mean something
            else, as with digits and letters, ``CropAndFlip(flip=0)``; for what is no image, ``Unchanged()``.
        trust: which samples are trusted; None for the paper's ``SurestOfAll``.
        temperature: T; below 1 it sharpens, above it flattens.
        threshold: omega in the first step.
        share: of N / C that may be trusted of each class.
        limit: of trusted samples per class.
        part: of a batch that are trusted samples.
        seed: of views and draws.

    Raises:
        ConfigError: a number is out of range, or the network does not predict one class per sample.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, appendix E; FixMatch (Sohn et al., 2020),
    https://arxiv.org/abs/2001.07685.
    """

    def __init__(
        self,
        weak: View | None = None,
        strong: View | None = None,
        trust: Trust | None = None,
        *,
        temperature: float = 2.0,
        threshold: float = 0.9,
        share: float = 1.0,
        limit: int = 100,
        part: float = 0.25,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ConfigError(f"PseudoLabel: temperature must be positive, got {temperature}")
        if not (0 <= threshold < 1 and 0 <= part <= 1):
            raise ConfigError(f"PseudoLabel: threshold must be below 1 and part a share, got {threshold} and {part}")
        if share <= 0 or limit < 1:
            raise ConfigError(f"PseudoLabel: share must be positive and limit at least 1, got {share} and {limit}")
        self.weak = weak if weak is not None else Unchanged()
        self.strong = strong if strong is not None else CropAndFlip()
        self.trust = trust if trust is not None else SurestOfAll()
        self.temperature, self.threshold, self.share, self.limit = temperature, threshold, share, limit
        self.part, self.seed = part, seed
        self._course: Course | None = None
        self._passes: dict[str, int] = {}  # which pass over a task's samples the trusted ones were chosen in
        self._hosted: dict[str, Tensor] = {}  # the trusted ones, for whoever reads samples

    def check(self, task: str, samples: Samples, classes: int) -> None:
        """Refuses data without classes, and samples of which one of the two views cannot be made."""
        if classes < 2:
            raise ConfigError(
                f"PseudoLabel cannot learn task '{task}': it takes its own predictions for labels, of one class per sample",
                expected="a task with classes",
                got=f"{classes} classes",
                todo="use another objective for it, such as adamerge.Entropy",
            )
        seeds = seeds_of(self.seed, 0, torch.zeros(1, dtype=torch.int64))
        for view in (self.weak, self.strong):
            try:
                view(stack([samples[0]]), seeds)
            except ConfigError as error:
                raise ConfigError(
                    f"PseudoLabel cannot learn task '{task}': {error.what}",
                    expected=error.expected,
                    got=error.got,
                    todo="set model.objective.init_args.weak and strong to views of such samples, or to adamerge.Unchanged",
                ) from error

    def begin(self, course: Course) -> None:
        """Prepares for a fit in which no sample is trusted yet."""
        self._course = course
        self._passes, self._hosted = {}, {}
        for number, samples in enumerate(course.samples.values()):
            self.register_buffer(f"trusted_{number}", torch.full((len(samples),), UNTRUSTED))

    def get_extra_state(self) -> dict[str, int]:
        """Returns, for checkpoints, the pass that each task is in, a number that no device is asked for."""
        return dict(self._passes)

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continues in the passes that a checkpoint says."""
        self._passes, self._hosted = dict(state), {}

    def trusted(self, task: str) -> Tensor:
        """Returns the class that each of the task's samples is trusted to be of, -1 for none: ``(samples,)``."""
        return self.get_buffer(f"trusted_{self._number(task)}")

    def omega(self, step: int) -> float:
        """Returns the probability that a pseudo-label must exceed at a step for its sample to count."""
        return self.threshold + (1 - self.threshold) * (step / self._fit.steps if step else 0.0)

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch with targets and strong view; renews the trusted samples at each pass over the samples."""
        if batch.indices is None:
            raise DataError("PseudoLabel: the batch does not say which samples it holds")
        done = batch.step * self._fit.batch_size // len(self._fit.samples[task])
        if self._passes.get(task) != done:
            self.trusted(task).copy_(self._trust(task, predict))
            self._passes[task] = done
            self._hosted.pop(task, None)
        batch = self._mix(task, batch)
        assert batch.indices is not None
        weak, strong = (seeds_of(self.seed, batch.step, batch.indices, purpose) for purpose in (WEAK, STRONG))
        logits = self._logits(predict(self.weak(batch.inputs, weak)))
        classes = self.trusted(task)[batch.indices.to(logits.device, non_blocking=True)]
        one_hot = torch.nn.functional.one_hot(classes.clamp_min(0), logits.shape[-1]).to(logits.dtype)
        softened = (logits / self.temperature).softmax(dim=-1)
        targets = torch.where((classes != UNTRUSTED)[:, None], one_hot, softened)
        return batch._replace(inputs=self.strong(batch.inputs, strong), targets=targets, lengths=None)

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns cross-entropies ``(samples,)`` of the strong views' logits ``(samples, classes)`` to the targets."""
        if batch.targets is None:
            raise DataError("PseudoLabel: the batch has no targets", todo="let prepare() see it first")
        return -(batch.targets * self._logits(output).log_softmax(dim=-1)).sum(dim=-1)

    def weight(self, batch: Batch) -> Tensor:
        """Returns 1 for samples whose target is sure enough, else 0; ``(samples,)``."""
        if batch.targets is None:
            raise DataError("PseudoLabel: the batch has no targets", todo="let prepare() see it first")
        return (batch.targets.amax(dim=-1) > self.omega(batch.step)).float()

    @property
    def _fit(self) -> Course:
        if self._course is None:
            raise ConfigError("PseudoLabel: begin() has not told it what the fit is going to see")
        return self._course

    def _number(self, task: str) -> int:
        return list(self._fit.samples).index(task)

    def _trust(self, task: str, predict: Predict) -> Tensor:
        """Returns each sample's trusted class, ``(samples,)``, after a look at all of them."""
        samples, classes = self._fit.samples[task], self._fit.classes[task]
        device = self.trusted(task).device
        probabilities = []
        for start in range(0, len(samples), AT_ONCE):
            inputs = stack([samples[index] for index in range(start, min(start + AT_ONCE, len(samples)))])
            probabilities.append(self._logits(predict(moved(inputs, device))).softmax(dim=-1))
        most = max(1, min(int(self.share * len(samples) / classes), self.limit))
        return self.trust(torch.cat(probabilities), most)

    def _on_host(self, task: str) -> Tensor:
        """Returns ``trusted`` on the CPU: the one thing that a device is waited for, once in each pass."""
        if task not in self._hosted:
            self._hosted[task] = self.trusted(task).cpu()
        return self._hosted[task]

    def _mix(self, task: str, batch: Batch) -> Batch:
        """Returns the batch in which ``part`` of the samples are trusted ones."""
        assert batch.indices is not None
        trusted, indices = self._on_host(task) != UNTRUSTED, batch.indices
        surplus = int(trusted[indices].sum()) - int(self.part * len(indices))
        pool = (~trusted if surplus > 0 else trusted).nonzero()[:, 0]
        if surplus == 0 or len(pool) == 0:
            return batch
        places = (trusted[indices] == (surplus > 0)).nonzero()[: abs(surplus), 0]
        draws = uniform(seeds_of(self.seed, batch.step, indices[places], DRAWS), 0)
        indices = indices.index_copy(0, places, pool[(draws * len(pool)).long()])
        samples, device = self._fit.samples[task], self.trusted(task).device
        inputs = moved(stack([samples[index] for index in indices.tolist()]), device)
        return batch._replace(inputs=inputs, indices=indices, lengths=None)

    def _logits(self, output: Output) -> Tensor:
        if output.logits.ndim != 2:
            raise ConfigError(
                "PseudoLabel needs one prediction per sample, and the network gives one per position",
                expected="logits (samples, classes)",
                got=tuple(output.logits.shape),
            )
        return output.logits.float()
