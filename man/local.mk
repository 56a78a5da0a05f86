# SPDX-License-Identifier: Apache-2.0
dist_man_MANS += man/finequantctl.1

dist_man_MANS += man/finequant-quantize.1
dist_man_MANS += man/finequant-bench.1
dist_man_MANS += man/libfinequant.3 man/finequant-protocol.7
