"""The verifier: where does an implementation depart from BEiT, by how much, and is that rounding or a bug?

streams         runs that stop at every recorded array, so that several advance together
float64_model   the truth                              trace_names     what is recorded, without computing it
difference      how far apart two arrays are           budget          how far off float32 may be
slices          the worst feature, token or head       judging         the verdict over one array
lockstep        all of it together: `check(Job(...), candidate, yardstick) -> Report`
engine_arithmetic   float32 as PyTorch computes it     low_precision   what 16 and 8 bits lose
informative     what the given weights cannot show     diagnosis       what an error means
known_mistakes, attention_mistakes, map_mistakes   the mistakes people make, op by op
networks        models and tokenizers, called alike     tokens          what a tokenizer chooses
pixels          the image processor's part             release_memory  pages of weights that are not in use
torch_runner, torch_tokenizer, timm_runner   PyTorch    trace_file      traces on disk, from anywhere
gradients       the backward in the same way           gradient_diagnosis, gradient_files, torch_gradients   its parts
kinks           where gradients jump                   sum_order       what plain sums over a map lose
report_text, report_html, report_html_parts   the report       bisect  which fast op is at fault?
weights         two checkpoints                        published       published outputs
golden_pack     test vectors for other implementations
"""
