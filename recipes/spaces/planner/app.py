"""Plan the cut of a model of the Hub from its config.json alone: sizes, what every stage takes, and a recipe to copy."""

import gradio as gr
from huggingface_hub.utils import HFValidationError, validate_repo_id

from hf_minitron.errors import RecipeError, told
from hf_minitron.planning.cost_text import cost_text
from hf_minitron.planning.costs import Machine
from hf_minitron.planning.drafting import draft
from hf_minitron.planning.plan_text import plan_text
from hf_minitron.recipe_file import read_yaml

INTRO = """\
# Plan a smaller model

Which sizes, how much GPU memory, how long? Counted from the model's `config.json` by
`hf-minitron plan` and `hf-minitron init`; no weights are read. Copy the recipe, change what you like, then
`hf-minitron run recipe.yaml`.
"""
# Wide tables scroll in themselves; numbers stay whole.
CSS = """
.plan { overflow-x: auto; }
.plan th, .plan td { white-space: nowrap; word-break: normal; text-align: right; }
.plan :is(th, td):first-child { text-align: left; }
"""


def plan(model: str, keep: float, gpus: float, gpu_memory: float) -> tuple[str, str, str]:
    """Return the table of sizes, the table of costs and a recipe; for what cannot be planned the reason in place of the first.

    Args:
        model (`str`): A Hub id.
        keep (`float`): Percent of the parameters.
        gpus (`float`): How many there are.
        gpu_memory (`float`): GB of each.
    """
    try:
        with told():
            machine = Machine(_whole(gpus), (gpu_memory or 0) * 1e9 or None)
            recipe = draft(hub_id(model), keep / 100, machine)
            values = read_yaml(recipe, "the recipe")
            return plan_text(values), cost_text(values, machine), recipe
    except RecipeError as error:
        return f"**This cannot be planned.** {error}", "", ""


def hub_id(model: str) -> str:
    """Return a model's Hub id; this machine's folders are nobody's business.

    Raises:
        RecipeError: for what is none.
    """
    name = (model or "").strip().removeprefix("https://huggingface.co/").strip("/")
    try:
        validate_repo_id(name.partition("@")[0])
        known = name.count("/") == 1
    except HFValidationError:
        known = False
    if not known:
        raise RecipeError(f"{model!r} is not a model of the Hub: write owner/name, such as Qwen/Qwen3-4B")
    return name


def _whole(number: float | None) -> int:
    if number is None or number != int(number):
        raise RecipeError(f"GPUs: {number} is not a whole number from 1 on")
    return int(number)


with gr.Blocks(title="Plan a smaller model") as page:
    gr.Markdown(INTRO)
    with gr.Row():
        model = gr.Textbox("Qwen/Qwen3-4B-Base", label="Model", info="owner/name on the Hub", scale=2)
        keep = gr.Slider(10, 100, 50, step=1, label="Keep, % of the parameters", scale=2)
        gpus = gr.Number(1, label="GPUs", precision=0, minimum=1)
        memory = gr.Dropdown([16, 24, 40, 48, 80, 141], value=80, label="GB of each GPU", allow_custom_value=True)
    button = gr.Button("Plan", variant="primary")
    sizes = gr.Markdown(label="Sizes", elem_classes="plan")
    cost = gr.Markdown(label="What it takes", elem_classes="plan")
    recipe = gr.Code(language="yaml", label="recipe.yaml")
    gr.on([page.load, button.click, model.submit], plan, [model, keep, gpus, memory], [sizes, cost, recipe], api_name="plan")

if __name__ == "__main__":
    page.launch(css=CSS)
