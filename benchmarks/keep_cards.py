"""Keep the cards of finished runs in model_cards/, each with the facts that it is rendered from.

python benchmarks/keep_cards.py runs/models/100m/ours runs/models/70m/ours        # names: the last folders of the path
python benchmarks/keep_cards.py runs/models/100m/ours --name smollm2-135m-100m
python benchmarks/keep_cards.py --again                                           # after a change of the card's template
"""

import argparse
from pathlib import Path

from hf_minitron.run import made_by
from hf_minitron.stages import publish

CARDS = Path(__file__).resolve().parent.parent / "model_cards"


def keep(folder: Path, name: str) -> Path:
    """Copy what the card of a published run needs to `model_cards/<name>` and return that."""
    run = made_by(str(folder / "publish/model"))
    if run is None:
        raise ValueError(f"{folder} is not the folder of a published run")
    publish.keep(run, CARDS / name)
    return CARDS / name


def main() -> None:
    """Copy cards, or render those that are there again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of published runs")
    parser.add_argument("--name", help="of the card's folder, for a single run")
    parser.add_argument("--again", action="store_true", help="write the cards in model_cards/ again, with their pictures")
    args = parser.parse_args()
    if args.name and len(args.runs) != 1:
        parser.error("--name is for a single run")
    for folder in args.runs:
        print(keep(folder, args.name or folder.resolve().name))
    for folder in sorted(path for path in CARDS.iterdir() if path.is_dir()) if args.again else ():
        publish.draw(folder)
        print(folder)


if __name__ == "__main__":
    main()
