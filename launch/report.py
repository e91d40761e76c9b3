"""Make one page of what runs have written: curves, speed, memory, a step by part, evaluations, and how they differ.

python launch/report.py runs/NAME                      runs/NAME/report/index.html, and its pictures as PNG
python launch/report.py runs/A runs/B --out compared   several runs in each picture
python launch/report.py sweeps/NAME                    all jobs of a sweep

Nothing is needed but the runs' folders: the page needs no network, and a run that is still going on has one too.
"""

import argparse
import sys
from pathlib import Path

from ringspan.train.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, or a sweep's")
    parser.add_argument("--out", type=Path, help="folder to write; default: RUN/report, of several runs ./report")
    asked = parser.parse_args()
    out = asked.out or (asked.runs[0] / "report" if len(asked.runs) == 1 else Path("report"))
    try:
        page = write_report(asked.runs, out)
    except (ValueError, OSError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
