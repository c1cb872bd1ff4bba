"""The kinds of objects that a package from outside may add; the list is closed.

A package adds an object with an entry point in its metadata and nothing else:

    [project.entry-points."distill.sinks"]
    tracker = "my_package.tracking:TrackerSink"

Students need no entry point: a recipe names their factory, ``arch: my_package.networks:make``.
"""

from enum import StrEnum

GROUP_PREFIX = "distill."  # before the kind, in the name of an entry-point group


class Kind(StrEnum):
    """What can be added, each by the name of its group; the comments say where the promise of each is."""

    LOSS = "losses"  # teacher.task.LossTerm, made by a factory that is given the recipe
    SOURCE = "sources"  # distill.data.sources.Lister, by the suffix of its files
    EXPORTER = "exporters"  # distill.weights.exporter.Exporter
    LAUNCHER = "launchers"  # distill.launch.launcher.Launcher
    SINK = "sinks"  # distill.runfolder.metrics.MetricSink, made by a factory for each network
    KEYS = "keys"  # distill.recipe.types.Section

    @property
    def group(self) -> str:
        """The group of entry points."""
        return GROUP_PREFIX + self.value
