import { defineConfig, type Options } from 'tsup'

const shared: Options = {
  outDir: 'dist',
  target: 'node20',
  platform: 'node',
  sourcemap: false,
  // The loader stays outside: it serves both formats and must find itself beside package.json.
  external: [/binding\.cjs$/],
  // No runtime dependencies: these two go into the bundle, their licences into THIRD-PARTY.md.
  noExternal: ['@huggingface/jinja', '@huggingface/tokenizers'],
}

export default defineConfig([
  {
    ...shared,
    entry: { index: 'ts/index.ts', policies: 'ts/policies/index.ts' },
    format: ['esm', 'cjs'],
    dts: { compilerOptions: { noEmit: false, stripInternal: true } },
  },
  {
    ...shared,
    entry: { cli: 'ts/cli/main.ts' },
    format: ['esm'],
    banner: { js: '#!/usr/bin/env node' },
  },
])
