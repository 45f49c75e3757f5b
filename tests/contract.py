"""What outside users may rely on: the views and their columns, at least."""

CONTRACT = {
    "prompts": "prompt_id text source cluster kept reason",
    "samples": "sample_id round prompt_id prompt seed model width height parent_id refiner image",
    "scores": "sample_id round scorer value",
    "embeddings": "sample_id round encoder vector",
    "distances": "sample_id round space metric reference value",
    "selections": "selection round sample_id kept rank weight reason",
    "evaluations": "round arm metric prompt_set value ci_low ci_high n",
    "rounds": "round arm model parent_model verdict reason seconds images",
    "curated": "sample_id round prompt image weight scores",
}
