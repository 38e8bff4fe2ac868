/** Chat messages to the text a model was trained on, through the model's own Jinja template. */

import { Template } from '@huggingface/jinja'
import { CacheError } from './errors.js'

/** One message of a conversation. */
export interface ChatMessage {
  readonly role: 'system' | 'user' | 'assistant' | (string & {})
  readonly content: string
}

/** A model's template. */
export interface ChatTemplate {
  /** The text of a conversation. `addGenerationPrompt` (default true) ends it where the assistant speaks. */
  render(
    messages: readonly ChatMessage[],
    options?: { readonly addGenerationPrompt?: boolean },
  ): string
}

/** Compiles a template; special tokens are what it may call `bos_token` and the like. @internal */
export function createTemplate(
  source: string,
  tokens: Readonly<Record<string, string>>,
): ChatTemplate {
  let template: Template
  try {
    template = new Template(source)
  } catch (error) {
    throw new CacheError('Unsupported', `chat template: ${(error as Error).message}`, {}, error)
  }
  return {
    render(messages, { addGenerationPrompt = true } = {}) {
      try {
        return template.render({
          ...tokens,
          messages: messages.map((m) => ({ ...m })),
          add_generation_prompt: addGenerationPrompt,
        })
      } catch (error) {
        throw new CacheError(
          'InvalidArgument',
          `chat template: ${(error as Error).message}`,
          {},
          error,
        )
      }
    },
  }
}
