"""What MkDocs builds the site from: the repository's own pages at their own places, so that links hold here and on the site.

`make docs` runs it; it needs the extra `docs`.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = (
    "*.md",
    "*.cff",
    "docs/*.md",
    "docs/*.svg",
    "recipes/**/*",
    "model_cards/**/*",
    "benchmarks/results/**/*.png",
    "benchmarks/*.py",
)
SHOWN = (".md", ".png", ".svg", ".jsonl", ".yaml", ".py", ".json", ".cff")
API = """\
# API

What `hf_minitron` exports; all of it is imported on first use.

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the pages of docs/ by those of the repository, and write the page of the API."""
    found = sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.suffix in SHOWN and path.is_file()})
    kept = [file for file in files if not file.is_documentation_page() and not file.src_uri.endswith(".py")]  # the theme's
    pages = [File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls) for path in found]
    return Files([*kept, *pages, File.generated(config, "docs/api.md", content=API + api())])


def api() -> str:
    """Return a directive of mkdocstrings for every exported name."""
    names = (
        (ROOT / "hf_minitron/__init__.py").read_text(encoding="utf-8").split("__all__ = [")[1].split("]")[0].split('"')[1::2]
    )
    return "\n".join(f"::: hf_minitron.{name}\n" for name in names)
