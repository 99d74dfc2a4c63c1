"""Memory and time of training on a device, computed from a model's shape and the settings of a run.

With P parameters in the layers and the image head, S positions per image and A arithmetic, a pass of one image takes
2 P S operations. A step runs `Objective.passes` images through the model. Each image with gradient takes one pass
forward and one back, on GPUs a second one forward, because layers are recomputed (trainable.py), and if all weights
train, one more for their gradients. Targets take one pass of the base each. N workers share the images:

    seconds per step >= 2 P S * (images * passes per image + passes of the base) / (N A)

It is expected to take TIMES_LIMIT as long, or as long as transformers takes to launch the kernels of that many passes,
as it does per layer of its sampling loop, if that is longer: it is for the embedded model on a GPU.

Not counted: attention over the image (1% of the products of Janus-Pro-7B), targets that are cached, and what FSDP
sends between GPUs, whose bytes are stated instead.

Memory of a worker is the sum of

    weights       layers and head, 1/N of them if sharded, and two layers that are gathered; the rest whole
    states        what AdamW keeps for trained weights: a LoRA and its gradients and moments in float32, 16 bytes each;
                  with full weights the gradients and moments in the dtype of the weights; 1/N of both if sharded
    base          a second, whole copy of the model, if all weights train and the loss needs the base
    activations   of r images: inputs of all L layers, r S L E b, and the larger of a layer's (SAVED and GRADIENTS) and
                  of the loss, r T V LOSS_BYTES; on CPUs, which recompute nothing, what all layers save, and the loss

(E width, V image vocabulary, T image tokens, b bytes of the weights' dtype.)
"""

from __future__ import annotations

from dataclasses import dataclass

from vce_ray.config import TrainConfig
from vce_ray.devices import Device
from vce_ray.models.shape import BYTES, Shape
from vce_ray.sampling.plan import TEXT_OVERHEADS
from vce_ray.training.objectives import objective_for

TIMES_LIMIT = {"sheet": 2.4, "gpu": 1.9, "cpu": 1.2}
"""Seconds of a step over its limit, by `Device.kind`. On a GPU, of the one step that was measured: 2.35 s on an H200
for 12 pairs and 8 kept images of Janus-Pro-7B, whose limit is 0.98 s by its data sheet (docs/run.md). On a CPU, of the
80 steps of `make demo`, which took 87 s on two cores (README): its targets are cached, so it does less than is counted.
"""
SAVED = (10, 4)
"""Numbers that a layer saves for its backward pass, per token: in widths of the model and of the feed-forward. A Llama
layer saves the input and the output of each norm (and, if norms train, a third), query, key, value and attended values;
gate, its activation, up, and their product."""
GRADIENTS = 3
"""Gradients that exist at once beside them, per token, in widths of the feed-forward."""
LOSS_BYTES = 18
"""Bytes per logit at the peak of a loss: logits and their gradients, log-probs of policy and target in float32."""


@dataclass(frozen=True)
class TrainingPlan:
    """Memory of each worker, and time of a training."""

    workers: int
    sharded: bool
    images: int
    """Images with gradient in a worker's largest step."""
    trained_parameters: int
    loaded_bytes: int
    """The whole model."""
    weight_bytes: int
    state_bytes: int
    base_bytes: int
    activation_bytes: int
    gathered_bytes: int
    """Weights that each worker receives from the others in a step."""
    usable_bytes: float
    """Memory of the device that can be planned with."""
    steps: int
    step_s: float
    """The limit."""
    expected_step_s: float

    @property
    def peak_bytes(self) -> int:
        """Bytes that a worker needs. It loads the whole model before it keeps a shard."""
        step = self.weight_bytes + self.state_bytes + self.base_bytes + self.activation_bytes
        return max(step, self.loaded_bytes)

    @property
    def fits(self) -> bool:
        """Whether the device has room for a worker."""
        return self.peak_bytes <= self.usable_bytes


def plan_training(shape: Shape, device: Device, config: TrainConfig) -> TrainingPlan:
    """Plan the training of a run, whether it fits or not. `config.num_workers` is the number of devices; None is 1."""
    objective = objective_for(config)
    passes, workers = objective.passes, config.num_workers or 1
    on_gpu, lora = device.kind != "cpu", config.weights == "lora"
    sharded = workers > 1 and (on_gpu if config.shard is None else config.shard)
    size, images = BYTES[shape.dtype], -(-passes.most // workers)
    trained = lora_parameters(shape, config.lora_rank) if lora else shape.step_parameters
    states = trained * (4 * 4 if lora else 3 * size)
    weights, layer = shape.step_parameters * size, shape.layer_parameters * size
    loaded, needs_copy = weights + shape.idle_parameters * size, objective.needs_base and not lora
    positions = shape.prompt_tokens + shape.image_tokens - 1
    forwards = 2 if on_gpu else 1  # layers are recomputed
    of_base = 3 if objective.needs_base else 0  # kept images in one pass, anchors in two
    per_image = forwards + (1 if lora else 2)
    products = 2 * shape.step_parameters * positions * (passes.trained * per_image + passes.base)
    step_s = products / workers / device.arithmetic
    # backward launches a kernel for each of two gradients
    launch_s = (forwards + 2 + of_base) * shape.layers * TEXT_OVERHEADS[device.kind].layer_s
    # gathered for each pass but that of a recomputed layer, which is still there; a copy of the base is whole
    gathers = 2 + (of_base if lora else 0)
    return TrainingPlan(
        workers=workers,
        sharded=sharded,
        images=images,
        trained_parameters=trained,
        loaded_bytes=loaded,
        weight_bytes=(weights // workers + 2 * layer if sharded else weights) + shape.idle_parameters * size,
        state_bytes=states // workers if sharded else states,
        base_bytes=loaded if needs_copy else 0,
        activation_bytes=activation_bytes(shape, images, recomputed=on_gpu),
        gathered_bytes=gathers * weights * (workers - 1) // workers if sharded else 0,
        usable_bytes=device.usable,
        steps=config.steps,
        step_s=step_s,
        expected_step_s=max(TIMES_LIMIT[device.kind] * step_s, launch_s),
    )


def activation_bytes(shape: Shape, images: int, recomputed: bool) -> int:
    """Return the bytes that the forward and backward pass of a step need beside weights and states.

    Args:
        recomputed: whether layers are recomputed in the backward pass.
    """
    size = BYTES[shape.dtype]
    tokens = images * (shape.prompt_tokens + shape.image_tokens - 1)
    loss = images * shape.image_tokens * shape.image_vocab * LOSS_BYTES
    saved = tokens * size * (SAVED[0] * shape.width + SAVED[1] * shape.feed_forward)
    if not recomputed:
        return shape.layers * saved + loss
    gradients = tokens * size * GRADIENTS * shape.feed_forward
    return shape.layers * tokens * size * shape.width + max(saved + gradients, loss)


def lora_parameters(shape: Shape, rank: int) -> int:
    """Return the number of weights of a LoRA on every matrix of the layers."""
    key_value = shape.width // shape.heads * shape.key_value_heads
    sides = 2 * (2 * shape.width) + 2 * (shape.width + key_value) + 3 * (shape.width + shape.feed_forward)
    return shape.layers * rank * sides


def reference_s(shape: Shape, device: Device, pairs: int, modes: int) -> tuple[float, float]:
    """Return the least and the expected seconds of the log-probs of pairs under the base, in each prompt mode."""
    positions = shape.prompt_tokens + shape.image_tokens - 1
    limit = 2 * shape.step_parameters * positions * 2 * pairs * modes / device.arithmetic
    return limit, TIMES_LIMIT[device.kind] * limit
