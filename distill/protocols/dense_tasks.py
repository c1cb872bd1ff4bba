"""The tasks of patch features, on pictures with maps or key points: what they read, and what computes them.

Each wants a network itself, not features of it: grids, sides and crops differ. What cannot be scored is a reason.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from distill.data.locations import Location, Reader
from distill.errors import DataError
from distill.listing.decode import Rgb, reason_of
from distill.listing.held import Held
from distill.listing.map_pairs import MapFolder, MapKind, PointPair, list_point_pairs
from distill.protocols.correspondence import score_correspondence
from distill.protocols.images import MOST_BYTES, PICTURE_LIMIT_S, LeftOut, log, read_pixels
from distill.protocols.linear_maps import OnBatch
from distill.protocols.map_scores import DEPTH, SEG, DepthTarget, SegTarget, score_maps
from distill.protocols.map_set import PatchNetwork, list_maps, open_maps
from distill.protocols.score import CannotScoreError, Protocol, Score

DENSE: Mapping[str, str] = {
    "seg": "linear segmentation",
    "depth": "linear depth",
    "correspondence": "correspondence",
}
OF_MAPS: Mapping[str, MapKind] = {"seg": "mask", "depth": "depth"}


@dataclass(frozen=True)
class DenseTask:
    """One task with its pictures: ``run`` takes a network and counts ``pictures`` of them."""

    run: Callable[[PatchNetwork, OnBatch], Score]
    pictures: int


@dataclass(frozen=True)
class DenseTasks:
    """By name: the tasks that can be scored, and why the others cannot.

    ``pictures`` holds what they decoded; ``folder`` has the pictures, and ``maps`` are files below it that are none.
    """

    tasks: Mapping[str, DenseTask]
    reasons: Mapping[str, str]
    pictures: Held
    folder: Path
    maps: frozenset[str]
    left_out: tuple[LeftOut, ...]


def open_dense(
    names: Sequence[str], source: Path, protocol: Protocol, background: Rgb | None
) -> DenseTasks:
    """Lists what every task reads, then decodes each picture once for all of them and whatever reads it later."""
    listed, reasons = dict[str, MapFolder | list[PointPair]](), dict[str, str]()
    left_out, tasks = list[LeftOut](), dict[str, DenseTask]()
    for name in names:
        try:
            if name in OF_MAPS:
                listed[name] = list_maps(source, OF_MAPS[name], protocol)
            else:
                listed[name], bad = list_point_pairs(source)
                left_out += [LeftOut(*each) for each in bad]
        except (CannotScoreError, DataError) as error:
            reasons[name] = str(error)
    reader, wanted = Reader(limit_s=PICTURE_LIMIT_S), list[Location]()
    for each in listed.values():
        wanted += (
            [pair.picture for pair in each.pairs]
            if isinstance(each, MapFolder)
            else [at for pair in each for at in pair.pictures]
        )
    pictures = Held(lambda at: read_pixels(reader, at, background), wanted, MOST_BYTES)
    for name, each in listed.items():
        try:
            tasks[name], lost = (
                _open_maps(name, each, pictures, protocol)
                if isinstance(each, MapFolder)
                else _open_points(each, pictures, protocol)
            )
            left_out += lost
        except CannotScoreError as error:
            reasons[name] = str(error)
    for one in left_out:
        log.warning("%s: left out of the scores, %s", one.sample, one.reason)
    folders = [each for each in listed.values() if isinstance(each, MapFolder)]
    roots = {each.pictures for each in folders}
    maps = frozenset[str]().union(*(each.maps for each in folders))
    folder = roots.pop() if len(roots) == 1 else source
    return DenseTasks(tasks, reasons, pictures, folder, maps, tuple(left_out))


def _open_maps(
    name: str, folder: MapFolder, pictures: Held, protocol: Protocol
) -> tuple[DenseTask, Sequence[LeftOut]]:
    maps = open_maps(folder, OF_MAPS[name], pictures)

    def run(network: PatchNetwork, on_batch: OnBatch) -> Score:
        target = SegTarget(len(maps.labels)) if name == "seg" else DepthTarget()
        return score_maps(network, maps, target, protocol, on_batch)

    published = SEG if name == "seg" else DEPTH
    passes = len(maps.train) if protocol == "quick" else published.steps * published.batch
    return DenseTask(run, passes + len(maps.test)), maps.left_out


def _open_points(
    pairs: Sequence[PointPair], pictures: Held, protocol: Protocol
) -> tuple[DenseTask, list[LeftOut]]:
    """Pairs whose pictures can be decoded and hold their points."""
    good, lost = list[PointPair](), list[LeftOut]()
    for pair in pairs:
        try:
            sides = [side for at in pair.pictures for side in pictures(at).shape[1::-1]]
        except OSError as error:
            lost.append(LeftOut(" and ".join(map(str, pair.pictures)), reason_of(error)))
            continue
        outside = [
            p for p in pair.points if not all(0 <= v < s for v, s in zip(p, sides, strict=True))
        ]
        if outside:
            reason = f"point {list(outside[0])} lies outside of {sides[:2]} and {sides[2:]} px"
            lost.append(LeftOut(" and ".join(map(str, pair.pictures)), reason))
        else:
            good.append(pair)
    if not good:
        raise CannotScoreError(f"{len(pairs)} pairs of pictures, none that can be used")
    run = partial(score_correspondence, good, pictures, protocol)
    return DenseTask(run, len(good)), lost
