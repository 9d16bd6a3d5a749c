"""One recipe for all of these tests."""

import pytest

from tests.pipeline.recipe import recipe, small_world
from tests.pipeline.stages.recipe_run import Finished, run


@pytest.fixture(scope="package")
def finished(one_quiet_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    home = tmp_path_factory.mktemp("recipe")
    world = small_world(home / "world")
    return Finished(world, home / "run", run(recipe(world, home / "run")))
