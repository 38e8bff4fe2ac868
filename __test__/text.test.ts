/** Stop strings, chat templates, recipes of the command line: what needs no model. */

import { expect, it } from 'vitest'
import { createTemplate } from '../ts/chat.js'
import { parseRecipe } from '../ts/recipe.js'
import { samplingJson } from '../ts/sampling.js'
import { stopText } from '../ts/session.js'

/** Feeds a text in pieces; returns what came out and whether it was stopped. */
function feed(stops: string[], pieces: string[]) {
  const t = stopText(stops)
  let out = ''
  for (const p of pieces) {
    const { text, hit } = t.push(p)
    out += text
    if (hit) return { out, hit }
  }
  return { out: out + t.rest(), hit: false }
}

it('stops at a string that comes in pieces, and gives out nothing of it', () => {
  expect(feed(['\n\n'], ['a\n', '\nb'])).toEqual({ out: 'a', hit: true })
  expect(feed(['END'], ['xE', 'N', 'Dy'])).toEqual({ out: 'x', hit: true })
  expect(feed(['END'], ['xE', 'N', 'E', 'ND'])).toEqual({ out: 'xEN', hit: true })
})

it('gives out what only looked like a stop string', () => {
  expect(feed(['END'], ['xE', 'N', 'y'])).toEqual({ out: 'xENy', hit: false })
  expect(feed(['END'], ['xEN'])).toEqual({ out: 'xEN', hit: false })
  expect(feed([], ['a', 'b'])).toEqual({ out: 'ab', hit: false })
})

it('takes the earliest of several stop strings, and holds back for the longest', () => {
  expect(feed(['cd', 'b'], ['abcd'])).toEqual({ out: 'a', hit: true })
  const t = stopText(['abcdef', 'de'])
  expect(t.push('xabcd').text).toBe('x')
})

it('renders a chat template', () => {
  const source =
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
  const t = createTemplate(source, { eos_token: '</s>' })
  const messages = [{ role: 'user', content: 'hi' }]
  expect(t.render(messages)).toBe('<|user|>hi</s><|assistant|>')
  expect(t.render(messages, { addGenerationPrompt: false })).toBe('<|user|>hi</s>')
  expect(() => createTemplate('{% for %}', {})).toThrowError(
    expect.objectContaining({ code: 'Unsupported' }),
  )
  const strict = createTemplate("{{ raise_exception('roles must alternate') }}", {})
  expect(() => strict.render([])).toThrowError(/roles must alternate/)
})

it('reads recipes as the command line writes them', () => {
  expect(parseRecipe('f16')).toEqual({ kv: 'f16', recipe: [] })
  expect(parseRecipe('bf16+int8')).toEqual({ kv: 'bf16', recipe: [{ use: 'int8' }] })
  expect(parseRecipe('streaming-llm:sinks=4,positions=packed').recipe).toEqual([
    { use: 'streaming-llm', sinks: 4, positions: 'packed' },
  ])
  expect(parseRecipe('[{"use":"int8","sinkRows":0}]').recipe).toEqual([
    { use: 'int8', sinkRows: 0 },
  ])
  for (const bad of ['', 'int8:sinkRows', 'INT8', '[{]', '[1]', '[{"a":1}]']) {
    expect(() => parseRecipe(bad), bad).toThrowError(
      expect.objectContaining({ code: 'InvalidArgument' }),
    )
  }
})

it('checks sampling options', () => {
  expect(JSON.parse(samplingJson({}))).toEqual({ temperature: 0, topK: 0, topP: 1, seed: 0 })
  const bad = [
    { temperature: -1 },
    { temperature: Number.NaN },
    { topK: 1.5 },
    { topP: 0 },
    { topP: 1.1 },
    { seed: -1 },
    { seed: 2 ** 53 },
  ]
  for (const options of bad) {
    expect(() => samplingJson(options), JSON.stringify(options)).toThrowError(/expected/)
  }
})
