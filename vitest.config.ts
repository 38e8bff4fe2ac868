import { defineConfig } from 'vitest/config'

export default defineConfig({
  // The examples import the package by its name, as a user does.
  resolve: { alias: { kvasir: new URL('./ts/index.ts', import.meta.url).pathname } },
  test: {
    include: ['__test__/**/*.test.ts'],
    globalSetup: ['__test__/setup.ts'],
    pool: 'forks',
    // Models and packing are heavy: two forks keep a machine of two cores fair.
    maxWorkers: 2,
    testTimeout: 120_000,
    hookTimeout: 120_000,
    typecheck: { enabled: true, include: ['__test__/**/*.test-d.ts'], tsconfig: './tsconfig.json' },
  },
})
