"""The verifier: where does an implementation depart from BEiT, by how much, and is that rounding or a bug?

streams         runs that stop at every recorded array, so that several go side by side
float64_model   the truth                              trace_names     what is recorded, without computing it
difference      how far two arrays are apart           budget          how far float32 may be
lockstep        all of it together: `check(Job(...), candidate, yardstick) -> Report`
diagnosis       what the error means                   known_mistakes  the mistakes people make, op by op
release_memory  pages of weights that are not in use
torch_runner, timm_runner     PyTorch as a yardstick   trace_file    traces on disk, from anywhere
report_text, report_html    the report               bisect        which fast op is it?
weights       two checkpoints                        published     published outputs      golden_pack   test vectors
"""
