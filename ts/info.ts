/** What this build can do. */

import { guard, type NativeMethod, type NativeOption, native } from './native.js'

/** One registered method. */
export type MethodInfo = NativeMethod

/** One option of a method. */
export type MethodOption = NativeOption

/** Backend, kernels and CPU. */
export interface BackendInfo {
  readonly backend: string
  /** Name of the processor. */
  readonly device: string
  /** Kernels in use. */
  readonly isa: string
  /** Kernels this CPU could use. */
  readonly available: readonly string[]
  readonly threads: number
  readonly os: string
  readonly arch: string
  readonly features: readonly string[]
}

/** Every method of this build. */
export function methods(): readonly MethodInfo[] {
  return JSON.parse(guard(() => native().methods())) as MethodInfo[]
}

/** What calls run on. */
export function backendInfo(): BackendInfo {
  return JSON.parse(guard(() => native().backendInfo())) as BackendInfo
}
