"""What each system costs: parameters, operations per image, images shown in training, operations of the training.

An image in use passes the gate, where there is one, then `passes` of the system's networks, then the decoder. A training step is
three forward passes, one forward and two for the gradients of activations and weights (Kaplan et al. 2020, arXiv 2001.08361,
section 2.1); of stages that are held as the trunk has them only the forward pass. A network that another one starts from is
part of what that one costs, and so are one pass of the gate over the training images, for the partition, one of the networks
over theirs, for the decoder, and the decoder's own steps. So is what a network learns from: a teacher's answers, one for every
image shown, and where the teacher is a whole mixture, all that the mixture itself cost; `teacher_flops` says how much of the sum
that is. Left out are augmentation, k-means and optimisers: all below 1 %.

Shape letters: E features of a network, Z unified dims, V tags, K experts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from hardmoe.config import Json
from hardmoe.models.flops import BackboneSize, measure_backbone
from hardmoe.stage import Context, InputArtifact
from hardmoe.training.network import architecture_of


@dataclass(frozen=True)
class Cost:
    """Of one system."""

    parameters: int
    """Of everything that it is made of, the gate's included."""
    active_parameters: int
    """Of what one image passes."""
    flops: int
    """Operations of one image in use."""
    images_seen: int
    """Images shown while its networks were trained, and those that they started from or learnt from."""
    training_flops: int
    """Operations of that training, and of what followed it; see the module."""
    routed_flops: int = 0
    """Of `flops`, those of experts within layers of its networks."""
    teacher_flops: int = 0
    """Of `training_flops`, those of the system that it learnt from, and of that one's answers."""


@dataclass(frozen=True)
class TrainedNetwork:
    """What counting needs to know of a finished network."""

    size: BackboneSize
    decoder_parameters: int
    images_seen: int
    teacher_flops: int = 0
    """Operations of a teacher's answers about those images."""

    @classmethod
    def of(cls, network: InputArtifact, branch_at: str | None = None) -> "TrainedNetwork":
        """From an artifact's record."""
        seen, payload = architecture_of(network), network.payload
        size = measure_backbone(seen.backbone, image_size=seen.image_size, stem=seen.stem, branch_at=branch_at, moe=seen.moe)
        decoder_parameters = (payload["num_features"] + 1) * seen.num_tags
        return cls(size, decoder_parameters, payload["examples_seen"], payload.get("teacher_flops", 0))

    @property
    def training_flops(self) -> int:
        """See the module."""
        moved = self.size.flops - self.size.spared_flops - self.size.shared_flops + 2 * self.decoder_parameters
        return self.images_seen * (3 * moved + self.size.shared_flops) + self.teacher_flops


@dataclass(frozen=True)
class SharedLayer:
    """An alignment and a decoder over several networks."""

    parameters: int
    decoder_parameters: int
    """Of those, the decoder's."""
    networks: int
    images_seen: int

    @classmethod
    def of(cls, decoder: InputArtifact) -> "SharedLayer":
        """From an artifact's record."""
        payload = decoder.payload
        own = (payload["dim"] + 1) * payload["num_tags"]
        return cls(payload["parameters"], own, payload["experts"], payload["examples_seen"])

    @property
    def active_parameters(self) -> int:
        """One alignment and the decoder."""
        return self.decoder_parameters + (self.parameters - self.decoder_parameters) // max(1, self.networks)


def cost_of(context: Context, system: str) -> Json:
    """The cost of one system of the evaluation stage, as plain JSON, without what it has none of."""
    cost = asdict(_cost_of(context, system))
    return {name: value for name, value in cost.items() if value or name not in ("routed_flops", "teacher_flops")}


def _cost_of(context: Context, system: str) -> Cost:
    told = context.stage.config["systems"][system]

    def artifacts(role: str, count: int) -> list[InputArtifact]:
        return [context.input(f"{system}:{role}-{index:04d}") for index in range(count)]

    networks = [TrainedNetwork.of(network, told.get("branch_at")) for network in artifacts("network", told["networks"])]
    starts = [TrainedNetwork.of(start) for start in artifacts("start", told["starts"])]
    gate = TrainedNetwork.of(context.input(f"{system}:gate")) if told.get("gate") else None
    layer = SharedLayer.of(context.input(f"{system}:decoder-0000")) if told["shared"] else None
    images: int = context.input("vocabulary").payload["labelled"]["train"]
    cost = total_cost(networks, starts, gate, layer, told["passes"], images)
    if "teacher" not in told:
        return cost
    return with_teacher(cost, _cost_of(context, told["teacher"]), sum(network.teacher_flops for network in networks))


def with_teacher(cost: Cost, teacher: Cost, answers: int) -> Cost:
    """The cost of a system with all that its teacher cost.

    Args:
        cost: of its own networks, the teacher's `answers` among them.
        teacher: of the system that they learnt from; whatever they start from is a part of it.
        answers: operations of what it said.
    """
    return replace(
        cost,
        images_seen=cost.images_seen + teacher.images_seen,
        training_flops=cost.training_flops + teacher.training_flops,
        teacher_flops=teacher.training_flops + answers,
    )


def total_cost(
    networks: Sequence[TrainedNetwork],
    starts: Sequence[TrainedNetwork],
    gate: TrainedNetwork | None,
    layer: SharedLayer | None,
    passes: int,
    num_images: int,
) -> Cost:
    """Add up one system.

    Args:
        networks: those of which an image passes `passes`; all of one architecture.
        starts: trained before them, and not among them: what they start from, and the gate.
        gate: passes over every image first; None for none.
        layer: the shared decoder; None where every network decodes with its own.
        passes: networks an image goes through.
        num_images: training images, over which the gate passes once, and the networks together once where there is a `layer`.
    """
    one, size = networks[0], networks[0].size
    # Operations of a linear layer are twice its weights; its biases, counted along, are a fraction of a per cent.
    decoding = 2 * (one.decoder_parameters if layer is None else layer.active_parameters)
    own_parameters, own_flops = size.parameters - size.shared_parameters, size.flops - size.shared_flops
    parameters = len(networks) * own_parameters
    parameters += len(networks) * one.decoder_parameters if layer is None else layer.parameters
    # The stages that experts share with the gate are counted there; a dense network that holds them has them to itself.
    held = BackboneSize(
        size.shared_flops,
        size.shared_parameters,
        inactive_parameters=size.shared_inactive_parameters,
        routed_flops=size.shared_routed_flops,
    )
    first = held if gate is None else gate.size
    active = passes * (own_parameters - size.inactive_parameters) + first.parameters - first.inactive_parameters
    active += one.decoder_parameters if layer is None else layer.active_parameters
    training = sum(network.training_flops for network in (*networks, *starts))
    if gate is not None:
        training += num_images * gate.size.flops
    if layer is not None:
        training += num_images * size.flops + 3 * layer.images_seen * decoding
    return Cost(
        parameters=parameters + first.parameters,
        active_parameters=active,
        flops=passes * (own_flops + decoding) + first.flops,
        images_seen=sum(network.images_seen for network in (*networks, *starts)),
        training_flops=training,
        routed_flops=passes * size.routed_flops + first.routed_flops,
    )
