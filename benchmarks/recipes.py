"""The README's table of recipes, made from the recipes themselves: `python -m benchmarks.recipes`."""

from benchmarks.report import replace_section
from opsd import recipes
from opsd.recipes.in_loop import lacking


def table() -> str:
    lines = ["| recipe | paper | contexts that it reads | what else it needs | in the loop | source of the formula |"]
    lines.append("|---|---|---|---|---|---|")
    for name in recipes.names():
        recipe = recipes.make(name)
        paper = f"[{recipe.paper}](https://arxiv.org/abs/{recipe.paper})" if recipe.paper else ""
        contexts, needs = (", ".join(words) or "–" for words in (recipe.contexts, recipe.needs))
        loop = "" if lacking(recipe) else "yes"
        lines.append(f"| `{name}` | {paper} | {contexts} | {needs} | {loop} | {recipe.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    replace_section("recipes", table())
