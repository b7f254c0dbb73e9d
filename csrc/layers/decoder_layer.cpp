// The choice of the level: see cpu/decoder_layer.cpp.
#include "layers/decoder_layer.h"

#include "core/dispatch.h"

#ifndef SPECBRANCH_EMULATED
namespace specbranch {

SPECBRANCH_CPU_KERNEL(decoder_layer, DecoderLayerParams)

void run_decoder_layer(const DecoderLayerParams& p) {
  if (p.launch.on_cuda()) fail("decoder_layer has no CUDA kernel: call its ops");
  cpu::decoder_layer(p);
}

}  // namespace specbranch
#endif
