"""The stages, in the order in which `run` does them; then those that look for a target rather than make a model."""

from hf_minitron.stages import cache, correct, distill, evaluate, prune, publish, score, search, select, synthesize, tokenize

STAGES = {
    stage.name: stage
    for stage in (
        correct.STAGE,
        synthesize.STAGE,
        score.STAGE,
        prune.STAGE,
        tokenize.STAGE,
        cache.STAGE,
        distill.STAGE,
        evaluate.STAGE,
        publish.STAGE,
        search.STAGE,
        select.STAGE,
    )
}
