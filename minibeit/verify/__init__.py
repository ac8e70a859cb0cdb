"""The verifier: where does an implementation depart from BEiT, by how much, and is that rounding or a bug?

streams       runs that stop at every recorded array, so that several go side by side
exact         the float64 truth                      names         what is recorded, without computing it
compare       how far two arrays are apart           budget        how far float32 may be
check         all of it together: `check(Job(...), candidate, yardstick) -> Report`
diagnosis     what the error means                   hypotheses    the mistakes people make, op by op
torch_runner, timm_runner   PyTorch as a yardstick   trace_file    traces on disk, from anywhere
report_text, report_html    the report               bisect        which fast op is it?
weights       two checkpoints                        published     published outputs      golden_pack   test vectors
"""
