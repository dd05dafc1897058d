"""``replknet train``: train or fine-tune a classifier, or continue a run."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from replknet.cli.typed import instantiate
from replknet.engine.classification import ClassificationTrainConfig
from replknet.engine.recipes import find_recipe, list_recipes
from replknet.engine.step import NonFiniteError
from replknet.engine.train import TrainResult, main


class RecipeAction(ActionConfigFile):
    """A configuration file, or the bare name of a recipe of the package."""

    def __call__(self, parser, cfg, values, option_string=None):
        try:
            path = find_recipe(values)
        except ValueError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, str(path), option_string)


def add_arguments(parser: ArgumentParser) -> None:
    """Options of the command: every field of the configuration."""
    parser.usage = (
        "replknet train [--config RECIPE] --data.root FOLDER [--SECTION.OPTION VALUE ...]"
    )
    parser.add_argument(
        "--config",
        action=RecipeAction,
        help=f"YAML file or recipe ({', '.join(list_recipes())}); what it leaves out is as below",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_class_arguments(ClassificationTrainConfig)


def run(arguments: Namespace) -> int:
    """Train; 0 when done, 128 + signal when stopped, 1 when the loss is not finite."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    config = instantiate(ClassificationTrainConfig, arguments)
    try:
        result = main(config)
    except NonFiniteError as error:
        print(f"replknet train: {error}", file=sys.stderr)
        return 1
    if result.main:
        print(json.dumps(asdict(result), default=str) if arguments.json else summary(result))
    return 0 if result.finished else 128 + (result.stopped_by or 0)


def summary(result: TrainResult) -> str:
    """How the run stands, for people."""
    if not result.finished:
        return f"stopped after step {result.step}; the same command continues {result.directory}"
    if result.best is None:
        return f"trained; the model is {result.directory / 'checkpoints' / 'last.safetensors'}"
    best = result.best
    return (
        f"best {best['metric']} {best['value']:.4f} after epoch {best['epoch']}; "
        f"the model is {result.directory / 'checkpoints' / 'best.safetensors'}"
    )
