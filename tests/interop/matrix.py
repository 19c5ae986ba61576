"""What works with whom: each capability, and the tests that show it for each peer. docs/interop.md is made of it."""

import pathlib

PEERS = ("bitsandbytes", "peft", "transformers", "huggingface_hub")
#: What writes docs/interop.md. A test file is in tests/interop, or in tests.
COMMAND = "python -m pytest tests/interop tests/test_hub.py tests/test_download.py --matrix docs/interop.md"
_BNB, _FILES, _PEFT = "test_bitsandbytes", "test_bitsandbytes_files", "test_peft"
_FALCON, _MODELS, _MERGED, _CALLS = "test_transformers", "test_transformers_models", "test_merged_files", "test_migration"
_FOLDERS, _PUSH, _LOAD = "test_transformers_files", "test_hub", "test_download"


def _tests(file: str, *names: str) -> list[str]:
    return [f"{file}::test_{name}" for name in names]


#: capability -> peer -> tests, as file::name.
ROWS: dict[str, dict[str, list[str]]] = {
    "tables of levels, the same numbers": {
        "bitsandbytes": _tests(
            _BNB, "the_tables_are_the_same_float32_numbers", "the_dynamic_tables_are_the_same_float32_numbers"
        ),
    },
    "NF4 codes, absmax, decoded values, bit for bit": {
        "bitsandbytes": _tests(
            _BNB,
            "nf4_codes_absmax_and_decoded_values_are_the_same_bytes",
            "nf4_bytes_are_the_same_where_a_rule_could_go_either_way",
        ),
    },
    "FP4 codes": {"bitsandbytes": _tests(_BNB, "fp4_codes_are_the_same_but_for_the_second_code_of_zero")},
    "double quantization, within both bounds": {
        "bitsandbytes": _tests(
            _BNB, "double_quantization_keeps_the_packed_bytes_and_its_values_are_within_the_sum_of_both_bounds"
        ),
    },
    "int8 rows, codes and absmax": {
        "bitsandbytes": _tests(_BNB, "int8_rows_have_the_same_codes_and_absmax_where_127_over_absmax_is_finite"),
    },
    "linear layers, no further from the exact product": {
        "bitsandbytes": _tests(
            _BNB,
            "a_4bit_layer_is_no_further_from_the_exact_product_than_that_of_bitsandbytes",
            "the_gradient_through_a_4bit_layer_is_no_further_from_the_exact_one",
            "an_8bit_layer_has_the_weight_of_bitsandbytes_and_is_nearer_to_the_exact_product",
        ),
    },
    "8-bit AdamW, step for step": {
        "bitsandbytes": _tests(
            _BNB,
            "from_the_same_encoded_state_every_step_is_that_of_bitsandbytes",
            "two_hundred_steps_of_a_regression_stay_beside_those_of_bitsandbytes_and_of_torch",
        ),
    },
    "4-bit checkpoints, theirs read": {
        "bitsandbytes": _tests(_FILES, "what_transformers_wrote_is_read_without_encoding_again"),
        "transformers": _tests(_FILES, "what_transformers_wrote_is_read_without_encoding_again"),
    },
    "4-bit checkpoints, ours read by them": {
        "bitsandbytes": _tests(_FILES, "bitsandbytes_decodes_any_layer_that_we_wrote_to_our_bits"),
        "transformers": _tests(_FILES, "transformers_loads_what_we_wrote_with_the_same_weights"),
    },
    "4-bit checkpoints of GPT-2's transposed layers": {
        "bitsandbytes": _tests(_FILES, "gpt2_whose_layers_lie_transposed_is_loaded_with_the_same_logits"),
        "transformers": _tests(_FILES, "gpt2_whose_layers_lie_transposed_is_loaded_with_the_same_logits"),
    },
    "8-bit checkpoints, theirs read": {
        "bitsandbytes": _tests(_FILES, "eight_bits_of_transformers_are_read"),
        "transformers": _tests(_FILES, "eight_bits_of_transformers_are_read"),
    },
    "8-bit checkpoints, ours read by them": {
        "bitsandbytes": _tests(_FILES, "transformers_loads_our_eight_bits"),
        "transformers": _tests(_FILES, "transformers_loads_our_eight_bits"),
    },
    "dense checkpoints, theirs read": {
        "transformers": _tests(
            _FALCON,
            "a_checkpoint_that_transformers_wrote_loads_with_the_same_logits",
            "a_sharded_bfloat16_checkpoint_of_transformers_loads_bit_for_bit",
            "a_config_that_transformers_wrote_is_the_config_that_it_was",
        ),
    },
    "dense checkpoints, ours read by them": {
        "transformers": _tests(
            _FALCON,
            "a_checkpoint_of_ours_loads_in_transformers_with_the_same_logits",
            "a_config_of_ours_is_read_by_transformers_as_it_was",
        ),
    },
    "its models' dense folders, encoded as they are read: every model of the list, experts one by one": {
        "transformers": _tests(
            _FOLDERS,
            "a_dense_folder_of_transformers_fills_an_encoded_model_with_the_bytes_of_encoding_it_in_memory",
            "a_dense_folder_of_experts_fills_a_dense_model",
        ),
    },
    "its models encoded, saved and read as they are": {
        "transformers": _tests(
            _FOLDERS,
            "an_encoded_model_is_saved_and_read_as_it_is_into_one_without_weights",
            "what_save_pretrained_writes_of_an_encoded_model_is_read_as_it_is",
        ),
    },
    "folders of codes are refused and not taken for weights": {
        "transformers": _tests(_MODELS, "what_save_pretrained_writes_of_an_encoded_model_is_refused_when_it_is_loaded"),
    },
    "Falcon: logits, gradients, greedy tokens": {
        "transformers": _tests(
            _FALCON,
            "logits_are_those_of_transformers_for_any_config",
            "gradients_of_all_parameters_are_those_of_transformers",
            "greedy_generation_is_that_of_transformers_token_for_token",
        ),
    },
    "LoRA adapters, theirs read": {
        "peft": _tests(_PEFT, "we_read_what_peft_wrote_on_the_same_layers_with_the_same_logits"),
    },
    "LoRA adapters, ours read by them": {
        "peft": _tests(_PEFT, "peft_reads_what_we_wrote_on_the_same_layers_with_the_same_logits"),
    },
    "rank patterns, rsLoRA, DoRA, PiSSA, LoftQ, whole modules": {
        "peft": _tests(
            _PEFT,
            "peft_reads_every_kind_of_adapter_with_the_same_logits",
            "peft_reads_an_adapter_that_began_as_loftq_on_the_encoded_base",
        ),
    },
    "PiSSA and OLoRA of theirs, converted": {
        "peft": _tests(_PEFT, "we_read_a_start_that_changed_the_base_once_peft_has_converted_it"),
    },
    "any set of layers, the same ones": {
        "peft": _tests(_PEFT, "for_any_set_of_layers_peft_wraps_the_ones_that_the_config_means"),
    },
    "encoded base and adapter, ours, opened together": {
        "bitsandbytes": _tests(_FILES, "base_and_adapter_of_ours_are_opened_together_by_transformers_bitsandbytes_and_peft"),
        "peft": _tests(_FILES, "base_and_adapter_of_ours_are_opened_together_by_transformers_bitsandbytes_and_peft"),
        "transformers": _tests(_FILES, "base_and_adapter_of_ours_are_opened_together_by_transformers_bitsandbytes_and_peft"),
    },
    "adapters on GPT-2's transposed layers": {"peft": _tests(_PEFT, "an_adapter_on_gpt2_is_the_same_to_both")},
    "adapters that are not supported, refused by name": {
        "peft": _tests(
            _PEFT,
            "what_peft_can_do_and_we_cannot_is_refused_by_name",
            "adapters_on_the_stacks_of_a_mixture_are_refused_by_name",
        ),
    },
    "merged weights": {
        "peft": _tests(_PEFT, "merging_gives_the_weights_that_peft_gives"),
        "transformers": _tests(
            _MERGED,
            "a_merged_falcon_says_in_transformers_what_the_adapted_one_said",
            "another_merged_model_of_transformers_says_what_it_says_when_it_is_merged_in_place",
            "an_encoded_conv1d_and_a_stack_of_experts_are_written_as_transformers_reads_them",
        ),
    },
    "merged mixtures, by the hub's names; the hub's folder as the original": {
        "transformers": _tests(
            _FOLDERS,
            "a_merged_folder_has_the_names_and_shapes_that_transformers_writes_and_the_same_logits",
            "the_original_of_a_mixture_is_the_folder_of_the_hub_with_its_experts_one_by_one",
        ),
    },
    "its models encoded: logits, generation, training": {
        "transformers": _tests(
            _MODELS,
            "logits_are_those_of_the_decoded_model_and_near_the_dense_one",
            "generate_says_the_tokens_of_the_decoded_model",
            "training_with_checkpointing_lowers_the_loss_and_leaves_the_base_alone",
        ),
    },
    "adapters of its models, in PEFT's files": {
        "peft": _tests(_MODELS, "peft_opens_the_adapter_on_the_dense_model_with_the_same_logits"),
        "transformers": _tests(_MODELS, "an_adapter_of_ours_is_loaded_onto_a_fresh_encoded_model"),
    },
    "its Trainer with our optimizer; our loop with its models": {
        "transformers": _tests(_MODELS, "the_trainer_of_transformers_trains_it_with_our_optimizer", "our_loop_trains_it"),
    },
    "every call of docs/migration.md": {
        "bitsandbytes": _tests(_CALLS, "every_row_of_the_bitsandbytes_table_runs_and_both_sides_hold_the_same"),
        "peft": _tests(_CALLS, "every_row_of_the_peft_table_runs_and_both_sides_adapt_the_same_layers"),
    },
    "push: private, no README replaced, a card from the run, a dry run, half of nothing": {
        "huggingface_hub": _tests(
            _PUSH,
            "the_adapter_and_its_card_go_to_a_private_repository_and_nothing_else",
            "what_a_run_left_goes_too",
            "a_card_in_the_repository_is_never_replaced",
            "a_dry_run_lists_what_would_go_and_contacts_nothing",
            "a_push_that_breaks_off_leaves_no_half_of_an_adapter",
        ),
    },
    "the card's own code loads the adapter and answers": {
        "peft": _tests(_PUSH, "the_code_of_the_card_loads_what_was_pushed_and_answers"),
        "transformers": _tests(_PUSH, "the_code_of_the_card_loads_what_was_pushed_and_answers"),
        "huggingface_hub": _tests(_PUSH, "the_code_of_the_card_loads_what_was_pushed_and_answers"),
    },
    "base, tokenizer, adapter by id and revision; cache; offline": {
        "huggingface_hub": _tests(
            _LOAD,
            "base_tokenizer_and_adapter_load_by_id_and_revision",
            "what_is_in_the_cache_is_not_downloaded_again",
            "offline_the_cache_answers_and_nothing_is_asked",
            "the_environment_alone_turns_a_process_to_the_hub_and_offline",
        ),
    },
    "401, 403, gated, 404": {
        "huggingface_hub": _tests(
            _LOAD,
            "a_private_repository_without_a_login_looks_like_none",
            "a_token_that_may_not",
            "a_gated_repository_says_that_there_are_terms",
            "a_repository_that_is_not_there",
            "a_revision_that_is_not_there",
            "a_file_that_is_not_there",
        ),
    },
    "rate limits, cut and damaged downloads": {
        "huggingface_hub": _tests(
            _LOAD,
            "a_rate_limit_says_how_long_to_wait",
            "a_rate_limit_on_a_file_is_waited_out",
            "a_cut_transfer_goes_on_where_it_was_cut",
            "a_transfer_that_stays_cut_leaves_no_part_of_a_file",
            "a_file_that_arrives_damaged_is_removed_and_comes_whole_the_next_time",
        ),
    },
}


def place(file: str) -> str:
    """The path of a test file, from the root of the repository."""
    here = pathlib.Path(__file__).parent
    return f"tests/interop/{file}.py" if (here / f"{file}.py").is_file() else f"tests/{file}.py"
