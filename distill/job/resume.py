"""Where a run goes on: the checkpoint that all ranks agree on, and what changed in the recipe since.

Everything that decides the result must be as it was, except the list of students: one that was
removed is not loaded, one that was added begins at the checkpoint's step with fresh weights and a
separate schedule from there to the family's end. The others continue as if nothing had changed.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from distill.errors import CheckpointError
from distill.recipe.keys import FamilyRecipe, TeacherRecipe, is_family_phase
from distill.runfolder import manifest as checkpoint
from distill.runfolder.manifest import ChangedError, Manifest, describe_found

MAX_NAME_BYTES = 256  # of a checkpoint's folder
Found = tuple[Path, Manifest]


def agreed_checkpoint(
    folder: Path, recipe_hash: str, control: dist.ProcessGroup, report: Callable[[str], None]
) -> Found | None:
    """The checkpoint to go on from, chosen and verified by world rank 0, which first removes what a run that died left.

    Communication: one broadcast of its name over ``control``, a gloo group of the world.

    Raises:
        CheckpointError: as ``find_latest``; or a rank does not see what rank 0 sees.
    """
    name = b""
    if dist.get_rank() == 0:
        checkpoint.clean(folder)
        found = checkpoint.find_latest(folder, recipe_hash, report)
        name = b"" if found is None else found[0].name.encode()
    letters = torch.zeros(MAX_NAME_BYTES, dtype=torch.uint8)
    letters[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    dist.broadcast(letters, src=0, group=control)
    agreed = bytes(letters.tolist()).rstrip(b"\0").decode()
    if not agreed:
        return None
    manifest = checkpoint.read_manifest(folder / agreed / checkpoint.MANIFEST)
    if manifest is None:
        raise CheckpointError(
            f"{folder / agreed}: rank {dist.get_rank()} cannot read what rank 0 reads",
            fix="Put --out on storage that all nodes share.",
        )
    return folder / agreed, manifest


def find_saved(folder: Path, recipe_hash: str, *, has_copies: bool) -> Found | None:
    """The newest sound checkpoint; also None where each is damaged and the ranks may hold copies in memory. Raises as ``find_latest``."""
    try:
        return checkpoint.find_latest(folder, recipe_hash, lambda _: None)  # the run reports
    except ChangedError:
        raise
    except CheckpointError:
        if not has_copies:
            raise
        return None


def joining_steps(
    recipe: FamilyRecipe | TeacherRecipe, networks: Mapping[str, str], found: Found | None
) -> dict[str, int]:
    """The step of the family at which each student begins: that of the checkpoint, the checkpoint's step for one that it does not hold.

    ``networks`` gives a hash of each student's recipe entry.

    Raises:
        ChangedError: a student is not what it was when it was saved.
        CheckpointError: it would join after its end.
    """
    if not isinstance(recipe, FamilyRecipe):
        return {}
    if found is None or not is_family_phase(found[1].phase):
        return dict.fromkeys(networks, 0)
    path, manifest = found
    done = recipe.step_of(manifest.phase, manifest.step)
    steps = {}
    for student in recipe.students:
        name = student.label
        saved = manifest.networks.get(name)
        if saved is not None and saved.hash != networks[name]:
            raise ChangedError(
                f"students.{name}: its lines in the recipe are not those of {path}",
                fix="Undo the change, or give it another name: it then starts with fresh weights.",
            )
        steps[name] = done if saved is None else saved.first_step
        if student.steps is not None and steps[name] >= student.steps:
            raise CheckpointError(
                f"students.{name}.steps = {student.steps}: the family has finished step {steps[name]} already",
                fix=f"Give it more than {steps[name]} steps, or leave `steps` out.",
            )
    return steps


def describe_resume(networks: Collection[str], found: Found | None) -> list[str]:
    """A line with the checkpoint that the run goes on from, and one for each student that joined since, or left."""
    if found is None:
        return []
    manifest, line = found[1], describe_found(found)
    step, saved = manifest.step, manifest.networks
    if not is_family_phase(manifest.phase):
        return [line]
    return [
        line,
        *(
            f"{name}: new, starts at step {step} with fresh weights"
            for name in networks
            if name not in saved
        ),
        *(
            f"{name}: no longer in the recipe, left at step {step}"
            for name in saved
            if name not in networks
        ),
    ]
